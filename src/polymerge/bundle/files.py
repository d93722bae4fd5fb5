"""Files of a bundle and of what leaves one: written whole or not at all.

A file is written under a scratch name that no other file has, and renamed. Knows bytes and files; does not know what a
tensor means, nor how whole folders get to their place (`polymerge.bundle.place`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import DiskSpaceError, PolymergeError

# Names of what is being written: whose it is, and what no other has.
SCRATCH = re.compile(r"\.[0-9a-f]{12}-[0-9a-f]{12}\.polymerge")
BUFFER = 2**20
# What an entry of a header takes beside its key: dtype, shape, two offsets of twelve digits, some to spare.
ENTRY_ROOM = 100
# Tensors that are not linear weights are read in slabs of about this many numbers: a vocabulary of 128,256 x 4,096
# in float32 would be 2 GB.
SLAB_NUMEL = 16_777_216
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
class Rows:
    """A tensor that comes a few rows at a time, so that it is never whole in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]


class Entry(NamedTuple):
    """A tensor of a safetensors file to be; dtype as the format names it ("F32", ...)."""

    key: str
    dtype: str
    shape: Sequence[int]
    bytes: int


class FileEntry(BaseModel):
    """Size and hash of one file, as the manifest lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


def slabs(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) rows of a tensor, about SLAB_NUMEL numbers at a time; a number without dimensions is one row."""
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, SLAB_NUMEL // max(1, width))
    rows = shape[0] if shape else 1
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def entry_of(key: str, tensor: Tensor | Rows) -> Entry:
    """What a header says of a tensor."""
    return Entry(key, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), math.prod(tensor.shape) * tensor.dtype.itemsize)


def chunks_of(tensor: Tensor | Rows) -> Iterator[memoryview]:
    """The tensor's bytes, a part at a time."""
    for part in tensor.parts if isinstance(tensor, Rows) else (tensor,):
        yield raw_bytes(part.detach().cpu())


def header_of(entries: Iterable[Entry], room: int = 0) -> bytes:
    """The beginning of a safetensors file: 8-byte little-endian length, JSON, and spaces, as the format allows.

    Args:
        entries: in the order of the data.
        room: bytes that the header shall take; it takes more where it must.
    """
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        said[entry.key] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(said, separators=(",", ":")).encode()
    size = max(_aligned(len(text)), room - 8)
    return struct.pack("<Q", size) + text.ljust(size)


def header_room(keys: Iterable[str]) -> int:
    """Bytes that are enough for the header of a file with these tensors, before their shapes and sizes are known."""
    return len(header_of(())) + _aligned(sum(len(json.dumps(key)) + ENTRY_ROOM for key in keys))


def _aligned(size: int) -> int:
    """The data starts on a multiple of eight, as the format's own writer does it."""
    return size + -size % 8


def write_safetensors(target: Path, entries: Sequence[Entry], chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Streams a safetensors file whose sizes are known. Written whole or not at all.

    Args:
        entries: in the order of the data, which has no holes.
        chunks: the data of all entries, one after the other.
    """
    head, size = header_of(entries), sum(entry.bytes for entry in entries)
    digest, written = hashlib.sha256(head), 0
    with _in_place_of(target) as handle:
        handle.write(head)
        for chunk in chunks:
            handle.write(chunk)
            digest.update(chunk)
            written += len(chunk)
        if written != size:
            raise PolymergeError(f"{target}: expected {size} bytes of tensors, got {written}; start the merge again")
    return FileEntry(bytes=len(head) + size, sha256=digest.hexdigest())


def write_json(target: Path, data: Any) -> FileEntry:
    """Writes JSON atomically, keys as given, a list of numbers on one line."""
    # The standard encoder takes a hundred bytes for every number of a list that it indents, and a vocabulary is one.
    token, lines = secrets.token_hex(8), list[str]()

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        if not isinstance(value, list | tuple):
            return value
        if not value or any(type(item) is not int or item < 0 for item in value):
            return [marked(item) for item in value]
        lines.append(json.dumps(value))
        return f"{token}-{len(lines) - 1}"

    text = json.dumps(marked(data), indent=2, ensure_ascii=False)
    text = re.sub(rf'"{token}-(\d+)"', lambda match: lines[int(match[1])], text)
    return write_bytes(target, f"{text}\n".encode())


def write_bytes(target: Path, data: bytes) -> FileEntry:
    """Writes a small file atomically."""
    with _in_place_of(target) as handle:
        handle.write(data)
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@contextmanager
def _in_place_of(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the target's place when the block ends well, and is gone when it does not.

    Where the target is a link, the link is replaced.
    """
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(scratch_name(target))
        try:
            with scratch.open("xb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            scratch.rename(target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def scratch_name(target: Path) -> str:
    """A name beside the target that nothing has yet, and from which a later run tells whose it was."""
    return f".{_hashed(target.name)}-{secrets.token_hex(6)}.polymerge"


def scratches_of(target: Path) -> list[Path]:
    """What runs that were killed left of the target under scratch names. To be asked by its only writer."""
    if not target.parent.is_dir():
        return []
    start = f".{_hashed(target.name)}-"
    return [p for p in target.parent.iterdir() if p.name.startswith(start) and SCRATCH.fullmatch(p.name)]


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]


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
