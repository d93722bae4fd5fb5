"""Half-done work that survives a kill: finished tensors as pieces beside the output.

A work folder holds one folder of raw pieces per tensor and, written last, one JSON note that says that the tensor is
whole, with the SHA-256 of every piece. A resumed merge trusts a note only after checking its pieces. Safetensors files
are then put together from pieces without holding more than a buffer in memory.

Knows bytes and names; does not know how a folder gets to its place (`polymerge.bundle.place`) or what a tensor means.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from ..bundle.files import DTYPE_NAMES, Piece, disk_errors, raw_bytes
from ..bundle.place import begin_work, check_own
from ..bundle.stats import StatsLine
from ..errors import OutputExistsError, PolymergeError
from ..naming import check_paths

logger = logging.getLogger(__name__)

BUFFER = 8 * 2**20


@dataclass(frozen=True)
class Note:
    """What is known of a finished tensor.

    Attributes:
        pieces: where its bytes lie, of the base and of every expert.
        digests: expert -> SHA-256 of the source tensor's bytes.
        scales: expert -> rho_i (float32), for tensors that are stored against the base.
        stats: a line of merge_stats.jsonl an expert, for linear weights.
    """

    pieces: tuple[Piece, ...]
    digests: dict[str, str]
    scales: dict[str, float]
    stats: tuple[StatsLine, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Note:
        """Raises ValueError where the text is not a whole note, field for field."""
        note: Note = _note_reader().validate_json(text, strict=True)
        check_paths({piece.file for piece in note.pieces})
        return note


@cache
def _note_reader() -> TypeAdapter[Note]:
    return TypeAdapter(Note)


class Staging:
    """The half-done work of one merge, in a work folder (`polymerge.bundle.place`).

    Args:
        folder: the work folder.
        fingerprint: what must be equal for half-done work to be gone on with.
        about: what the folder's mark says beside its kind.

    Raises:
        OutputExistsError: the folder is not polymerge's, or holds another merge's half-done work.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], *, resume: bool, kind: str, **about: Any) -> None:
        self.folder = folder
        check_own(folder)
        note = folder / "merge.json"
        text = json.dumps(fingerprint, sort_keys=True, indent=1)
        if not (resume and _goes_on(note, text)):
            begin_work(folder, kind, **about)
            with disk_errors(folder):
                (folder / "parts").mkdir()
                _write_text(note, text)

    def finished(self, index: int) -> Note | None:
        """The note of a finished tensor, or None when it must be done (again)."""
        note = self._note(index)
        if not note.exists():
            return None
        try:
            finished = Note.from_json(note.read_bytes())
        except ValueError:  # damaged: the tensor is done again
            return None
        return finished if all(self._is_whole(piece) for piece in finished.pieces) else None

    @contextmanager
    def tensor(self, index: int) -> Iterator[PieceWriter]:
        """Collects the pieces of one tensor; the caller calls `finish` when all are there."""
        folder = self.folder / "parts" / f"{index:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with disk_errors(self.folder):
            yield PieceWriter(self.folder, folder)

    def finish(self, index: int, note: Note) -> Note:
        """Notes that a tensor is whole. The pieces that the note lists lie in this folder."""
        with disk_errors(self.folder):
            _write_text(self._note(index), note.to_json())
        return note

    def take(self, index: int, note: Note, contents: Mapping[str, bytes]) -> Note:
        """Notes that a tensor is whole whose pieces were written elsewhere: file -> bytes, as the note lists them."""
        with disk_errors(self.folder):
            for file, data in contents.items():
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / file).write_bytes(data)
        return self.finish(index, note)

    def content(self, piece: Piece) -> Iterator[bytes]:
        """The piece's bytes, a buffer at a time.

        Raises:
            PolymergeError: at the end, where they are not those that were written.
        """
        if not piece.file:
            yield bytes(piece.bytes)
            return
        digest = hashlib.sha256()
        with (self.folder / piece.file).open("rb") as handle:
            while chunk := handle.read(BUFFER):
                digest.update(chunk)
                yield chunk
        if digest.hexdigest() != piece.sha256:
            raise PolymergeError(
                f"{self.folder / piece.file}: is no longer what was written; run again with --resume to do it anew"
            )

    def _is_whole(self, piece: Piece) -> bool:
        file = self.folder / piece.file
        if not file.is_file() or file.stat().st_size != piece.bytes:
            return False
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest() == piece.sha256

    def _note(self, index: int) -> Path:
        return self.folder / "parts" / f"{index:06d}.json"


class PieceWriter:
    """Writes one tensor's pieces. `emit` has the signature that `polymerge.merging.compress` asks for.

    Args:
        root: what the pieces' names are relative to.
        folder: an empty folder in it, of this writer alone.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._root, self._folder = root, folder
        self._pieces: list[Piece] = []

    def emit(self, owner: str | None, key: str, tensor: Tensor) -> None:
        data = raw_bytes(tensor.detach().cpu())
        file = self._folder / f"{len(self._pieces)}.bin"
        file.write_bytes(data)
        self._pieces.append(
            Piece(
                owner,
                key,
                DTYPE_NAMES[tensor.dtype],
                tuple(tensor.shape),
                data.nbytes,
                str(file.relative_to(self._root)),
                hashlib.sha256(data).hexdigest(),
            )
        )

    def note(self, digests: Mapping[str, str], scales: Mapping[str, float], stats: Sequence[StatsLine]) -> Note:
        """What there is to know of the tensor, once all its pieces are written."""
        return Note(tuple(self._pieces), dict(digests), dict(scales), tuple(stats))


def half_done(folder: Path) -> int:
    """Bytes that an interrupted merge has left in a work folder for a resumed one."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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


def _write_text(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".writing")
    scratch.write_text(text)
    scratch.rename(path)
