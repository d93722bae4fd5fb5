"""A folder that llama.cpp serves: what `polymerge export --to gguf` notes in it, and the command that serves it.

Knows llama.cpp's arguments. Does not know how the folder is made (`polymerge.export.gguf`), nor how the server is run
(`server.py`) or spoken to (`engine.py`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from ...bundle.versioned import read_versioned
from ...errors import BundleError
from ...naming import check_expert_names
from ...sources.persona import Group, Persona
from ..exported import ExportedExpert, Strict, persona_beside

NOTE = "polymerge-gguf.json"
BASE = "base.gguf"
ADAPTER = "adapter.gguf"
Kind = Literal["f32", "bf16", "f16", "q8_0", "q4_k_m"]
# How far a served model may be from its 16-bit reference, in nats a token (mean over the probe). Rounding alone took
# 0.0006 at f16 and 0.02 at q8_0 on the demo's experts.
TOLERANCE: dict[Kind, float] = {"f32": 0.05, "bf16": 0.05, "f16": 0.05, "q8_0": 0.1, "q4_k_m": 0.5}


class Served(Strict):
    """What llama.cpp itself answers, against the bundle's expert.

    Attributes:
        kl: mean KL in nats a token over llama.cpp's likeliest tokens, all others taken as one: at most the true one.
        same_token: share of tokens at which both have the same likeliest one.
        tokens: at which this was measured.
    """

    kl: float
    same_token: float
    tokens: int


class GgufExpert(ExportedExpert):
    """One expert as llama.cpp serves it; what the export cost it is of the bundle's dtype.

    Attributes:
        bytes: of its adapter's file.
        served: measured with llama.cpp; None where it was not installed.
    """

    bytes: int
    served: Served | None = None


class GgufNote(Strict):
    """polymerge-gguf.json.

    Attributes:
        bundle: digest of the bundle that was exported.
        type: of the base.
        context: tokens that the model was made for.
        lost: one line for everything that could not be expressed and was left out all the same.
        negligible: one line for everything left out that is the average's within the rounding of 16 bits.
        written_by: what wrote the base: polymerge, or llama.cpp's converter.
        measured_with: the llama.cpp that `served` was measured with.
    """

    format: Literal["polymerge-gguf"] = "polymerge-gguf"
    format_version: Literal[1] = 1
    polymerge_version: str
    bundle: str
    type: Kind
    base_bytes: int
    context: int
    written_by: Literal["polymerge", "llama.cpp"]
    measured_with: str | None
    calibration_tokens: int
    experts: dict[str, GgufExpert]
    lost: tuple[str, ...]
    negligible: tuple[str, ...]

    @field_validator("experts")
    @classmethod
    def _experts_are_safe(cls, experts: dict[str, GgufExpert]) -> dict[str, GgufExpert]:
        check_expert_names(experts)
        return experts

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    def persona(self, folder: Path, expert: str, average: Persona) -> tuple[Persona, tuple[Group, ...]]:
        """An expert's persona, and in which groups it is not the average's. Raises SourceError for a broken file."""
        served = self.experts.get(expert)
        beside = folder / served.adapter if served else folder / BASE
        return persona_beside(beside.parent, served.persona if served else (), average)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that the served experts' answers depend on."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_note(folder: str | Path) -> GgufNote:
    """What an exported folder says of itself.

    Raises:
        BundleError: not such a folder, its note was changed, or a file is not the size that it says.
    """
    folder = Path(folder).expanduser()
    missing = f"{folder}: has no {NOTE}; make such a folder with `polymerge export BUNDLE --to gguf -o {folder}`"
    note = read_versioned(GgufNote, folder / NOTE, error=BundleError, missing=missing, fix="export the bundle again")
    sizes = {BASE: note.base_bytes} | {expert.adapter: expert.bytes for expert in note.experts.values()}
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise BundleError(f"{file}: missing, or not of {size} bytes as {NOTE} says; export the bundle again")
    return note


def serve_command(folder: str | Path, note: GgufNote) -> list[str]:
    """llama-server on the folder: adapters in the order of the experts, none of them applied until a request asks."""
    folder = Path(folder).expanduser().resolve()
    adapters = [part for expert in note.experts.values() for part in ("--lora", str(folder / expert.adapter))]
    return ["llama-server", "-m", str(folder / BASE), *adapters, "--lora-init-without-apply", "-c", str(note.context)]
