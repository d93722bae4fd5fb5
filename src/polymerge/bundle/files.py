"""Files of a bundle and of what leaves one: written whole or not at all, and put in their place by renaming.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import DiskSpaceError, OutputExistsError, PolymergeError

# A tensor of a safetensors file to be: key, dtype ("F32", ...), shape, bytes.
Entry = tuple[str, str, Sequence[int], int]

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


# The bytes of a piece, a buffer at a time.
Content = Callable[[Piece], Iterable[bytes]]


class FileEntry(BaseModel):
    """Size and hash of one file, as the manifest lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def zeros_piece(owner: str | None, key: str, dtype: str, shape: tuple[int, ...]) -> Piece:
    """A piece of zeros that lies nowhere."""
    width = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
    count = 1
    for size in shape:
        count *= size
    return Piece(owner, key, dtype, shape, count * width)


def write_safetensors(target: Path, entries: Sequence[Entry], chunks: Iterable[bytes]) -> FileEntry:
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
    return FileEntry(bytes=8 + len(text) + offset, sha256=digest.hexdigest())


def write_pieces(target: Path, pieces: Sequence[Piece], content: Content) -> FileEntry:
    """Joins pieces into one safetensors file, in the order given. Written whole or not at all."""
    chunks = (chunk for piece in pieces for chunk in content(piece))
    return write_safetensors(target, [(p.key, p.dtype, p.shape, p.bytes) for p in pieces], chunks)


def write_json(target: Path, data: Any) -> FileEntry:
    """Writes JSON atomically, keys as given, a list of numbers on one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\s+(\d[\d,\s]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    return write_bytes(target, f"{text}\n".encode())


def write_bytes(target: Path, data: bytes) -> FileEntry:
    """Writes a small file atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".writing")
    with disk_errors(target.parent), scratch.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    scratch.rename(target)
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def check_name(output: Path) -> None:
    """Raises OutputExistsError unless a folder could be made at `output`, were nothing there."""
    if not output.name or output.name == "..":
        raise OutputExistsError(f"{output}: not the name of a folder to make; give one, such as ./bundle")
    blocking = next((parent for parent in output.parents if parent.exists() and not parent.is_dir()), None)
    if blocking:
        raise OutputExistsError(f"{output}: {blocking} is a file, so no folder can be made in it")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError unless a bundle may be written to `output`."""
    check_name(output)
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output}: exists; give --overwrite to replace it, or another --output")
    if output.exists() and not _is_bundle(output):
        raise OutputExistsError(f"{output}: exists and is not a bundle; it is never overwritten")


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


def publish(assembled: Path, output: Path) -> Path:
    """Moves a whole folder to its place. What was there stays, as `<output>.previous`, until the new one is there.

    Killed anywhere, it leaves the old folder or the new one at the output, or, between the two renames, the old one
    beside it, from where `restore` brings it back.
    """
    with disk_errors(output):
        sync_tree(assembled)
    previous = _previous(output)
    shutil.rmtree(previous, ignore_errors=True)
    if output.exists():
        output.rename(previous)
    assembled.rename(output)
    sync_folder(output.parent)
    shutil.rmtree(previous, ignore_errors=True)
    return output


def restore(output: Path) -> None:
    """Brings back what a `publish` that was killed between its two renames left beside the output."""
    previous = _previous(output)
    if previous.exists() and not output.exists():
        previous.rename(output)


def sync_tree(folder: Path) -> None:
    """Returns when all files in the folder and the folders themselves are on the disk, the innermost first."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def sync_folder(folder: Path) -> None:
    """Returns when the folder's entries are on the disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _previous(output: Path) -> Path:
    return output.with_name(output.name + ".previous")


def _is_bundle(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "polymerge.json").exists() or not any(folder.iterdir()))
