"""Half-done work that survives a kill: finished tensors in the files where they will stay, and a journal of them.

Tensors are finished in the plan's order. A line of the journal, written after a tensor's bytes, says that it is whole,
with their SHA-256. A run that goes on trusts the lines as far as the bytes are what they say; what comes after is cut
off and done again.

Knows bytes and names; does not know how a folder gets to its place (`polymerge.bundle.place`) or what a tensor means.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from ..bundle.files import Rows, chunks_of, disk_errors, entry_of
from ..bundle.growing import GrowingFile, Piece
from ..bundle.place import begin_work, check_own, discard_work, mark_of
from ..bundle.stats import StatsLine
from ..errors import OutputExistsError
from .layout import Layout
from .outcome import TensorReport
from .tables import Emit

logger = logging.getLogger(__name__)

BUNDLE = "bundle"
JOURNAL = "journal.jsonl"
NOTE = "merge.json"


@dataclass(frozen=True)
class Note:
    """What is known of a finished tensor.

    Attributes:
        number: which of the plan's tensors it is.
        pieces: what was written of it, of the base and of every expert.
        digests: expert -> SHA-256 of the source tensor's bytes.
        scales: expert -> rho_i (float32), for tensors that are stored against the base.
        stats: a line of merge_stats.jsonl an expert, for linear weights.
        borrowed: expert -> the one whose factors are its own too, and what they count for it.
    """

    number: int
    pieces: tuple[Piece, ...]
    digests: dict[str, str]
    scales: dict[str, float]
    stats: tuple[StatsLine, ...]
    borrowed: dict[str, tuple[str, float]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Note:
        """Raises ValueError where the text is not a whole note, field for field."""
        note: Note = _note_reader().validate_json(text, strict=True)
        return note


@cache
def _note_reader() -> TypeAdapter[Note]:
    return TypeAdapter(Note)


class Staging:
    """The bundle, or the expert, that grows in a work folder.

    Args:
        work: the work folder; what it holds of the same work already is gone on with.
        layout: which file each tensor goes to.

    Attributes:
        bundle: the folder that will be the bundle, or parts of it.
        notes: of the tensors that are whole, in the plan's order.
    """

    def __init__(self, work: Path, layout: Layout) -> None:
        self.bundle, self._layout = work / BUNDLE, layout
        self._journal = work / JOURNAL
        self.files = {
            file: GrowingFile(self.bundle / file, layout.owner_of(file), room) for file, room in layout.rooms.items()
        }
        with disk_errors(work):
            self.bundle.mkdir(exist_ok=True)
            self._leave_only_tensors()
            self.notes = self._finished()

    def finish(self, work: Callable[[Emit], TensorReport]) -> Note:
        """Does the plan's next tensor: what it emits is appended to its files, and the journal notes it when whole."""
        pieces: list[Piece] = []

        def emit(owner: str | None, key: str, tensor: Tensor | Rows) -> None:
            file = self.files[self._layout.file_of(owner, key)]
            pieces.append(file.append(entry_of(key, tensor), chunks_of(tensor)))

        report = work(emit)
        note = Note(len(self.notes), tuple(pieces), report.digests, report.scales, tuple(report.stats), report.borrowed)
        with self._journal.open("ab") as journal:
            journal.write(note.to_json().encode() + b"\n")
        self.notes.append(note)
        return note

    def file_of(self, expert: str) -> GrowingFile:
        return self.files[self._layout.experts[expert]]

    def _finished(self) -> list[Note]:
        """The notes up to the first that is damaged, or whose pieces are; the journal is cut off there."""
        notes: list[Note] = []
        if not self._journal.exists():
            return notes
        whole = 0
        for line in self._journal.read_bytes().splitlines(keepends=True):
            try:
                note = Note.from_json(line.removesuffix(b"\n"))
                if not line.endswith(b"\n") or note.number != len(notes) or not self._take(note):
                    break
            except ValueError:
                break
            notes.append(note)
            whole += len(line)
        with self._journal.open("r+b") as journal:
            journal.truncate(whole)
        return notes

    def _take(self, note: Note) -> bool:
        before = {file: len(growing.pieces) for file, growing in self.files.items()}
        try:
            if all(self.files[self._layout.file_of(p.owner, p.key)].take(p) for p in note.pieces):
                return True
        except KeyError:  # of no file of this bundle
            pass
        for file, count in before.items():
            del self.files[file].pieces[count:]
        return False

    def _leave_only_tensors(self) -> None:
        """What a stopped run had put beside them is written anew."""
        growing = {file.path for file in self.files.values()}
        for path in sorted(self.bundle.rglob("*"), reverse=True):  # the innermost first
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in growing:
                path.unlink()


def begin(work: Path, fingerprint: dict[str, Any], *, resume: bool) -> None:
    """Makes a merge's work folder, or leaves the one that holds the beginning of this very merge.

    Args:
        fingerprint: what must be equal for half-done work to be gone on with.

    Raises:
        OutputExistsError: the folder is not polymerge's, or holds another merge's half-done work.
    """
    check_own(work)
    text = json.dumps(fingerprint, sort_keys=True, indent=1)
    if resume and _goes_on(work / NOTE, text):
        return
    begin_work(work, "merge")
    with disk_errors(work):
        scratch = work / f"{NOTE}.writing"
        scratch.write_text(text)
        scratch.rename(work / NOTE)


def end_published(work: Path) -> None:
    """Discards the work folder of a merge that was killed after its bundle had come to its place."""
    if mark_of(work) is not None and (work / NOTE).exists() and not (work / BUNDLE).exists():
        discard_work(work)


def half_done(work: Path) -> int:
    """Bytes that an interrupted merge has left in a work folder for a resumed one."""
    return sum(file.stat().st_size for file in work.rglob("*") if file.is_file())


def _goes_on(note: Path, text: str) -> bool:
    """Whether the work folder holds the beginning of this very merge.

    Without the note nothing was done yet: the run that made the folder was stopped before its first tensor.
    """
    if not note.exists():
        return False
    written = note.read_bytes()
    if written == text.encode():
        return True
    try:
        json.loads(written)
    except (ValueError, RecursionError):
        logger.warning("%s: cannot be read, so what was half done is done anew", note)
        return False
    raise OutputExistsError(
        f"{note.parent}: half-done work of another recipe, other sources or another version; "
        "run without --resume to start again"
    )
