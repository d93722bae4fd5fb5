"""Half-done work that survives a kill: finished tensors as pieces beside the output, and the move into place.

`<output>.partial/` holds one folder of raw pieces per tensor and, written last, one JSON note that says that the
tensor is whole, with the SHA-256 of every piece. A resumed merge trusts a note only after checking its pieces.
Safetensors files are then put together from pieces without holding more than a buffer in memory.

Knows bytes, names and renames; does not know what a tensor means.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DiskSpaceError, OutputExistsError, PolymergeError

# A tensor of a safetensors file to be: key, dtype ("F32", ...), shape, bytes.
Entry = tuple[str, str, Sequence[int], int]

BUFFER = 8 * 2**20
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Piece:
    """One tensor on its way into a safetensors file: who owns it, under which key, and where its bytes lie.

    `file` is relative to the staging folder; an empty one stands for zeros.
    """

    owner: str | None
    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class FileRecord:
    """A written file, as the manifest lists it."""

    bytes: int
    sha256: str


class Staging:
    """The folder `<output>.partial` of one merge.

    Raises:
        OutputExistsError: the output is there and `overwrite` is off, or another merge's half-done work is.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self._previous = output.with_name(output.name + ".previous")
        if self._previous.exists() and not output.exists():  # killed between the two renames of `publish`
            self._previous.rename(output)
        check_output(output, overwrite=overwrite)
        note = self.folder / "merge.json"
        text = json.dumps(fingerprint, sort_keys=True, indent=1)
        # Without the note nothing was done yet: the run that made the folder was stopped before its first tensor.
        if resume and note.exists():
            if note.read_text() != text:
                raise OutputExistsError(
                    f"{self.folder}: half-done work of another recipe, other sources or another version; "
                    "run without --resume to start again"
                )
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        _write_text(note, text)

    def finished(self, index: int) -> dict[str, Any] | None:
        """The note of a finished tensor, or None when it must be done (again)."""
        note = self._note(index)
        if not note.exists():
            return None
        try:
            data: dict[str, Any] = json.loads(note.read_text())
            pieces = pieces_of(data)
        except (ValueError, KeyError, TypeError):
            return None
        return data if all(self._is_whole(piece) for piece in pieces) else None

    @contextmanager
    def tensor(self, index: int) -> Iterator[PieceWriter]:
        """Collects the pieces of one tensor; the caller calls `finish` when all are there."""
        folder = self.folder / "parts" / f"{index:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with disk_errors(self.folder):
            yield PieceWriter(self.folder, folder)

    def finish(self, index: int, note: dict[str, Any]) -> dict[str, Any]:
        """Notes that a tensor is whole. The pieces that the note lists lie in this folder."""
        with disk_errors(self.folder):
            _write_text(self._note(index), json.dumps(note))
        return note

    def take(self, index: int, note: dict[str, Any], contents: Mapping[str, bytes]) -> dict[str, Any]:
        """Notes that a tensor is whole whose pieces were written elsewhere: file -> bytes, as the note lists them."""
        with disk_errors(self.folder):
            for file, data in contents.items():
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / file).write_bytes(data)
        return self.finish(index, note)

    def write_safetensors(self, target: Path, pieces: Sequence[Piece]) -> FileRecord:
        """Joins pieces into one safetensors file, in the order given. Written whole or not at all."""
        chunks = (chunk for piece in pieces for chunk in self.content(piece))
        return write_safetensors(target, [(p.key, p.dtype, p.shape, p.bytes) for p in pieces], chunks)

    def publish(self, assembled: Path) -> None:
        """Moves the finished folder to the output's place; a previous bundle stays until the new one is there."""
        _sync_folder(assembled)
        shutil.rmtree(self._previous, ignore_errors=True)
        if self.output.exists():
            self.output.rename(self._previous)
        assembled.rename(self.output)
        _sync_folder(self.output.parent)
        shutil.rmtree(self._previous, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def content(self, piece: Piece) -> Iterator[bytes]:
        """The piece's bytes, a buffer at a time."""
        if not piece.file:
            yield bytes(piece.bytes)
            return
        with (self.folder / piece.file).open("rb") as handle:
            while chunk := handle.read(BUFFER):
                yield chunk

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

    def note(self, report: dict[str, Any]) -> dict[str, Any]:
        """What there is to know of the tensor, once all its pieces are written."""
        return {"pieces": [asdict(piece) for piece in self._pieces], "report": report}


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def pieces_of(note: dict[str, Any]) -> list[Piece]:
    """The pieces that a finished tensor's note lists."""
    return [Piece(**{**piece, "shape": tuple(piece["shape"])}) for piece in note["pieces"]]


def zeros_piece(owner: str | None, key: str, dtype: str, shape: tuple[int, ...]) -> Piece:
    """A piece of zeros that lies nowhere."""
    width = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
    count = 1
    for size in shape:
        count *= size
    return Piece(owner, key, dtype, shape, count * width)


def write_safetensors(target: Path, entries: Sequence[Entry], chunks: Iterable[bytes]) -> FileRecord:
    """Streams a safetensors file: 8-byte little-endian header length, JSON header, data without holes.

    Args:
        entries: in the order of the data.
        chunks: the data of all entries, one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, dtype, shape, size in entries:
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of eight, as the format's own writer does it
    digest, written = hashlib.sha256(), 0
    scratch = target.with_name(target.name + ".writing")
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(target.parent), scratch.open("wb") as handle:
        for chunk in (struct.pack("<Q", len(text)), text):
            handle.write(chunk)
            digest.update(chunk)
        for chunk in chunks:
            handle.write(chunk)
            digest.update(chunk)
            written += len(chunk)
        handle.flush()
        os.fsync(handle.fileno())
    if written != offset:
        raise PolymergeError(f"{target}: expected {offset} bytes of tensors, got {written}; start the merge again")
    scratch.rename(target)
    return FileRecord(8 + len(text) + offset, digest.hexdigest())


def write_json(target: Path, data: Any) -> FileRecord:
    """Writes JSON atomically, keys as given, a list of numbers on one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\s+(\d[\d,\s]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    return write_bytes(target, f"{text}\n".encode())


def write_bytes(target: Path, data: bytes) -> FileRecord:
    """Writes a small file atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".writing")
    with disk_errors(target.parent), scratch.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    scratch.rename(target)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError unless a bundle may be written to `output`."""
    if not output.name or output.name == "..":
        raise OutputExistsError(f"{output}: not the name of a folder to make; give one, such as ./bundle")
    blocking = next((parent for parent in output.parents if parent.exists() and not parent.is_dir()), None)
    if blocking:
        raise OutputExistsError(f"{output}: {blocking} is a file, so no folder can be made in it")
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output}: exists; give --overwrite to replace it, or another --output")
    if output.exists() and not _is_bundle(output):
        raise OutputExistsError(f"{output}: exists and is not a bundle; it is never overwritten")


def half_done(output: Path) -> int:
    """Bytes that an interrupted merge to `output` has left for a resumed one."""
    folder = output.with_name(output.name + ".partial")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_free_space(folder: Path, needed: int) -> None:
    """Raises DiskSpaceError unless the file system of `folder` has `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskSpaceError(
            f"{folder}: the merge writes {needed / 1e9:.2f} GB there, but only {free / 1e9:.2f} GB are free; "
            "free some or choose another --output"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise DiskSpaceError(f"{folder}: a file grew too large for this file system or its limits") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"{folder}: the disk is full; what is done is kept, free some room and run again with --resume"
            ) from None
        raise


def _write_text(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".writing")
    scratch.write_text(text)
    scratch.rename(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_bundle(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "polymerge.json").exists() or not any(folder.iterdir()))
