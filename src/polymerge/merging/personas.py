"""Which expert has what of its own beside its weights, in a merge and for one that is added.

The bundle's persona is the first expert's, with the tokenizer of the first that has one. Knows checkpoints' personas;
how they are compared is `polymerge.sources.persona`'s, how they are stored `polymerge.bundle.personas`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..bundle.files import FileEntry
from ..bundle.personas import write_persona
from ..bundle.write import bundle_config
from ..sources.checkpoint import Checkpoint
from ..sources.outline import OutlineCheckpoint
from ..sources.persona import Group, Persona, differing, in_words, persona_of


@dataclass(frozen=True)
class Personas:
    """What a merge's experts have beside their weights.

    Attributes:
        bundle: the average's.
        experts: name -> its own; one without a tokenizer has the bundle's.
        groups: name -> in which groups it is not the bundle's.
        notes: what the bundle will say of them.
        hints: what a user should hear before the merge.
    """

    bundle: Persona
    experts: Mapping[str, Persona]
    groups: Mapping[str, tuple[Group, ...]]
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


def personas_of(checkpoints: Mapping[str, Checkpoint]) -> Personas:
    """What the experts of a merge have beside their weights; the first expert's persona is the bundle's.

    Raises:
        SourceError: a file of a tokenizer or of generation settings is no JSON.
    """
    experts = {name: persona_of(checkpoint) for name, checkpoint in checkpoints.items()}
    first, bundle = next(iter(experts.items()))
    speaker = next((name for name, persona in experts.items() if persona.files), None)
    notes, hints = [], []
    if speaker is None and not any(isinstance(c, OutlineCheckpoint) for c in checkpoints.values()):
        hints.append("no expert has a tokenizer: the bundle will take token ids, and no text")
    elif speaker not in (None, first):
        bundle = bundle.with_tokenizer_of(experts[str(speaker)])
        notes.append(f"{first!r} has no tokenizer; the bundle takes {speaker!r}'s")
    groups = {name: differing(bundle, persona) for name, persona in experts.items()}
    unlike = sorted({group for of_expert in groups.values() for group in of_expert})
    if unlike:
        notes.append(f"experts differ in {in_words(unlike)}; the average has what {first!r} has")
    return Personas(bundle, experts, groups, tuple(notes), tuple(hints))


def store_persona(
    folder: Path, expert: str, persona: Persona, groups: tuple[Group, ...], *, dtype: str, tied: bool, code: bool
) -> dict[str, FileEntry]:
    """Writes what an expert has of its own under its folder in `folder`; nothing where that is nothing.

    Args:
        dtype, tied, code: as for `bundle_config`.
    """
    if not groups:
        return {}
    config = bundle_config(persona.config, dtype=dtype, tied=tied, code=code)
    return write_persona(folder, expert, persona, groups, config, code=code)
