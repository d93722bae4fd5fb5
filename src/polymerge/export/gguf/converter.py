"""llama.cpp's own converters and its quantiser, where the user has them.

Knows where they lie in a copy of llama.cpp, and their arguments. They run in processes of their own, with the packages
of this Python (`sentencepiece` among them).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from ...bundle.manifest import ADAPTER_FILE
from ...bundle.peft import PEFT_PREFIX
from ...engine.llamacpp.folder import Kind
from ...errors import ModelError
from ...sources.checkpoint import read_json

MODEL, LORA, QUANTIZE = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "llama-quantize"
_ERROR = re.compile(r"^(?:ERROR:[^:]*:|\w*(?:Error|Exception)\b:?)\s*(.+)", re.MULTILINE)


@dataclass(frozen=True)
class LlamaCpp:
    """A copy of llama.cpp. Its converters come with its sources, and with those of llama-cpp-python.

    Raises:
        ModelError: its folder lacks a converter.
    """

    folder: Path

    def __post_init__(self) -> None:
        for name in (MODEL, LORA):
            if not (self.folder / name).is_file():
                raise ModelError(f"{self.folder}: has no {name}; give the folder of llama.cpp's sources")

    def base(self, model: Path, file: Path, kind: Kind) -> None:
        """A checkpoint's folder as a GGUF file. Raises ModelError as llama.cpp's converter says."""
        _run([sys.executable, self.folder / MODEL, model, "--outfile", file, "--outtype", kind])

    def adapter(self, peft: Path, base: Path, file: Path, kind: Kind, transposed: Collection[str] = ()) -> None:
        """PEFT's folder as a LoRA file over a checkpoint's folder.

        The converter knows one rank: factors of another one are given the quotient by which llama.cpp will divide. It
        turns products as it turns the checkpoint's tensors, so those of `transposed` modules (GPT-2's, stored [in,
        out]) are turned first.
        """
        _one_scale(peft)
        _turn(peft, transposed)
        _run([sys.executable, self.folder / LORA, peft, "--base", base, "--outfile", file, "--outtype", kind])


def _one_scale(peft: Path) -> None:
    """Multiplies every B by its rank over the adapter's alpha."""
    alpha, file = float(read_json(peft / "adapter_config.json")["lora_alpha"]), peft / ADAPTER_FILE
    tensors = load_file(file)
    for key in (key for key in tensors if ".lora_B." in key or ".lora_embedding_B" in key):
        if tensors[key].shape[1] != alpha and _uniform(peft):
            tensors[key] = tensors[key] * (tensors[key].shape[1] / alpha)
    save_file(tensors, file)


def _turn(peft: Path, modules: Collection[str]) -> None:
    """B A of these modules as its transpose, A^T B^T."""
    tensors = load_file(file := peft / ADAPTER_FILE)
    for module in modules:
        a, b = (f"{PEFT_PREFIX}{module}.lora_{part}.weight" for part in "AB")
        if a in tensors:
            tensors[a], tensors[b] = tensors[b].T.contiguous(), tensors[a].T.contiguous()
    save_file(tensors, file)


def _uniform(peft: Path) -> bool:
    """Whether every pair's alpha is its rank, so that all have the scale 1."""
    config = read_json(peft / "adapter_config.json")
    return bool(config["lora_alpha"] == config["r"] and config.get("alpha_pattern") == config.get("rank_pattern"))


def quantizer(llama_cpp: LlamaCpp | None) -> Path:
    """`llama-quantize`: of the copy of llama.cpp, else on the path. Raises ModelError: there is none."""
    folders = [llama_cpp.folder / part for part in ("build/bin", "bin", ".")] if llama_cpp else []
    files = [folder / QUANTIZE for folder in folders]
    command = next((file for file in files if file.is_file()), None) or shutil.which(QUANTIZE)
    if command is None:
        raise ModelError(
            f"q4_k_m needs llama.cpp's {QUANTIZE}, which is neither on the path nor in --llama-cpp FOLDER; build it "
            f"(cmake --build build --target {QUANTIZE}), or take --type q8_0"
        )
    return Path(command)


def quantize(command: Path, source: Path, target: Path, kind: Kind) -> None:
    """Quantises a GGUF file. Raises ModelError as llama.cpp says."""
    _run([command, source, target, kind.upper()])


def _run(arguments: Sequence[str | Path]) -> None:
    done = subprocess.run([str(part) for part in arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        told = _ERROR.findall(done.stderr) or lines[-1:] or [f"exit code {done.returncode}"]
        name = Path(arguments[1] if str(arguments[0]) == sys.executable else arguments[0]).name
        raise ModelError(f"{name}: {' '.join(told[-1].split())[:300]}")
