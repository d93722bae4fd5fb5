"""A safetensors file that grows: tensors come one by one, and the header is written last, in the room kept for it.

So what is finished lies where it will stay, before it is known what else will come and how large that is. The room is
decided beforehand, so that the file's bytes do not depend on how often the work was stopped. Knows one file; which
tensors it gets, and what a stopped run had written of it, is told (`polymerge.merging.journal`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import PolymergeError
from .files import BUFFER, Entry, FileEntry, header_of, write_safetensors


@dataclass(frozen=True)
class Piece:
    """A tensor that is whole in its file. `owner` is the expert whose file it is, None for the average."""

    owner: str | None
    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str

    @property
    def entry(self) -> Entry:
        return Entry(self.key, self.dtype, self.shape, self.bytes)


class GrowingFile:
    """One file of tensors, from the first to the header.

    Args:
        path: where it is and stays.
        owner: whose tensors they are.
        room: bytes kept for the header (`polymerge.bundle.files.header_room`).
    """

    def __init__(self, path: Path, owner: str | None, room: int) -> None:
        self.path, self._owner, self._room = path, owner, room
        self.pieces: list[Piece] = []

    @property
    def size(self) -> int:
        """Bytes up to the end of what is whole."""
        return self._room + sum(piece.bytes for piece in self.pieces)

    def append(self, entry: Entry, chunks: Iterable[bytes | memoryview]) -> Piece:
        """Writes the next tensor.

        Raises:
            PolymergeError: its bytes are not as many as the entry says.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        digest, written = hashlib.sha256(), 0
        with self.path.open("ab") as handle:
            handle.truncate(self.size)  # of what was begun and never whole; or the header's room, at first
            for chunk in chunks:
                handle.write(chunk)
                digest.update(chunk)
                written += len(chunk)
        if written != entry.bytes:
            raise PolymergeError(f"{self.path}: tensor {entry.key!r} has {written} bytes, expected {entry.bytes}")
        piece = Piece(self._owner, entry.key, entry.dtype, tuple(entry.shape), written, digest.hexdigest())
        self.pieces.append(piece)
        return piece

    def take(self, piece: Piece) -> bool:
        """Goes on after a piece that a stopped run had written next, if that is so and it is whole."""
        try:
            with self.path.open("rb") as handle:
                handle.seek(self.size)
                digest = hashlib.sha256()
                for chunk in _blocks(handle, piece.bytes):
                    digest.update(chunk)
        except OSError:
            return False
        if digest.hexdigest() != piece.sha256:
            return False
        self.pieces.append(piece)
        return True

    def read_numbers(self, piece: Piece) -> list[int]:
        """One of the pieces, of int32."""
        place = self._room + sum(before.bytes for before in self.pieces[: self.pieces.index(piece)])
        with self.path.open("rb") as handle:
            handle.seek(place)
            numbers: list[int] = np.frombuffer(handle.read(piece.bytes), dtype="<i4").tolist()
            return numbers

    def finish(self, entries: Sequence[Entry] | None = None) -> FileEntry:
        """Writes the header, and reads the whole file again.

        Args:
            entries: what the header says of the data, in its order; by default the pieces as they were appended.

        Raises:
            PolymergeError: a tensor is no longer what was written.
        """
        entries = [piece.entry for piece in self.pieces] if entries is None else entries
        if not self.pieces:
            return write_safetensors(self.path, [], [])
        head = header_of(entries, self._room)
        if len(head) > self._room:  # nothing was right about the room: the data moves
            return write_safetensors(self.path, entries, self._content())
        with self.path.open("r+b") as handle:
            handle.write(head)
            handle.truncate(self.size)
        digest = hashlib.sha256(head)
        for chunk in self._content():
            digest.update(chunk)
        return FileEntry(bytes=self.size, sha256=digest.hexdigest())

    def _content(self) -> Iterator[bytes]:
        with self.path.open("rb") as handle:
            handle.seek(self._room)
            for piece in self.pieces:
                digest = hashlib.sha256()
                for chunk in _blocks(handle, piece.bytes):
                    digest.update(chunk)
                    yield chunk
                if digest.hexdigest() != piece.sha256:
                    raise PolymergeError(
                        f"{self.path}: tensor {piece.key!r} is no longer what was written; "
                        "run again with --resume to do it anew"
                    )


def _blocks(handle: BinaryIO, size: int) -> Iterator[bytes]:
    while size and (chunk := handle.read(min(size, BUFFER))):
        size -= len(chunk)
        yield chunk
