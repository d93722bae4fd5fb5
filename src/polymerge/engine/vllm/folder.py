"""A folder that vLLM serves: what `polymerge export --to vllm` notes in it, and the command that starts vLLM on it.

Knows vLLM's limits and arguments. Does not know how the folder is made (`polymerge.export.vllm.export`), nor how the
server is run (`vllm_server`) or spoken to (`vllm_engine`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ...bundle.versioned import read_versioned
from ...errors import BundleError
from ...naming import check_expert_names
from ...sources.persona import Group, Persona
from ..exported import AVERAGE, ExportedExpert, Strict, persona_beside

NOTE = "polymerge-vllm.json"
# What `vllm serve --max-lora-rank` accepts (vLLM 0.32, vllm/config/lora.py).
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Architectures for which vLLM takes an adapter on the embedding and on the output head (`embedding_modules` in
# vllm/model_executor/models, 0.32).
EMBEDDING_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
# On CPUs, vLLM 0.32 gives requests without an adapter whatever lies in the last slot (they index it as -1, in
# vllm/lora/ops/torch_ops): one more slot than experts keeps that one empty.
SPARE_SLOTS = 1
# Part of vLLM's command line: never to be taken for an option.
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}$")]


class VllmNote(Strict):
    """polymerge-vllm.json.

    Attributes:
        bundle: digest of the bundle that was exported.
        target_modules: last names of the modules that any adapter changes; vLLM reserves room for no others.
        head_adapters: an adapter changes the output head, beside which vLLM cannot score prompts (`vllm_scores`).
        slot_bytes: what vLLM reserves for one loaded adapter, every rank padded to `max_lora_rank`.
        lost: one line for everything that could not be expressed.
    """

    format: Literal["polymerge-vllm"] = "polymerge-vllm"
    format_version: Literal[1] = 1
    polymerge_version: str
    bundle: str
    dtype: Annotated[str, Field(pattern=r"^[a-z0-9]+$")]
    max_lora_rank: int
    target_modules: tuple[ModuleName, ...]
    head_adapters: bool
    base_bytes: int
    slot_bytes: int
    calibration_tokens: int
    experts: dict[str, ExportedExpert]
    lost: tuple[str, ...]

    @field_validator("experts")
    @classmethod
    def _experts_are_safe(cls, experts: dict[str, ExportedExpert]) -> dict[str, ExportedExpert]:
        check_expert_names(experts)
        return experts

    def to_json(self) -> str:
        data = self.model_dump(mode="json")
        for expert in (expert for expert in data["experts"].values() if not expert["persona"]):
            del expert["persona"]  # which older readers do not know
        return json.dumps(data, ensure_ascii=False) + "\n"

    def persona(self, folder: Path, expert: str, average: Persona) -> tuple[Persona, tuple[Group, ...]]:
        """An expert's persona, and in which groups it is not the average's. Raises SourceError for a broken file."""
        served = self.experts.get(expert)
        groups = served.persona if served else ()
        return persona_beside(folder / served.adapter if served else folder, groups, average)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that the served experts' answers depend on."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def padded_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that holds a rank; the largest there is for ranks beyond it."""
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), LORA_RANKS[-1])


def read_note(folder: str | Path) -> VllmNote:
    """What an exported folder says of itself.

    Raises:
        BundleError: not such a folder, or its note was changed.
    """
    file = Path(folder).expanduser() / NOTE
    missing = f"{folder}: has no {NOTE}; make such a folder with `polymerge export BUNDLE --to vllm -o {folder}`"
    return read_versioned(VllmNote, file, error=BundleError, missing=missing, fix="export the bundle again")


def serve_arguments(folder: str | Path, note: VllmNote) -> list[str]:
    """What `vllm serve FOLDER` is told beside the folder: the average and every expert under its own name."""
    folder = Path(folder).expanduser().resolve()
    modules = [f"{name}={folder / expert.adapter}" for name, expert in note.experts.items()]
    return [
        *("--served-model-name", AVERAGE),
        *("--dtype", note.dtype),
        "--enable-lora",
        *("--max-lora-rank", str(note.max_lora_rank)),
        *("--max-loras", str(len(note.experts) + SPARE_SLOTS)),
        *("--lora-target-modules", *note.target_modules),
        *("--lora-modules", *modules),
    ]
