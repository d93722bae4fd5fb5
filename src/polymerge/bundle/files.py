"""Files of a bundle and of what leaves one: written whole or not at all.

A file is written under a scratch name that no other file has, and renamed. Knows bytes and files; does not know what a
tensor means, nor how whole folders get to their place (`polymerge.bundle.place`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import DiskSpaceError, PolymergeError

# Names of what is being written: whose it is, and what no other has.
SCRATCH = re.compile(r"\.[0-9a-f]{12}-[0-9a-f]{12}\.polymerge")
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
    with _in_place_of(target) as handle:
        for chunk in (struct.pack("<Q", len(text)), text):
            handle.write(chunk)
            digest.update(chunk)
        for chunk in chunks:
            handle.write(chunk)
            digest.update(chunk)
            written += len(chunk)
        if written != offset:
            raise PolymergeError(f"{target}: expected {offset} bytes of tensors, got {written}; start the merge again")
    return FileEntry(bytes=8 + len(text) + offset, sha256=digest.hexdigest())


def write_pieces(target: Path, pieces: Sequence[Piece], content: Content) -> FileEntry:
    """Joins pieces into one safetensors file, in the order given. Written whole or not at all."""
    chunks = (chunk for piece in pieces for chunk in content(piece))
    return write_safetensors(target, [(p.key, p.dtype, p.shape, p.bytes) for p in pieces], chunks)


def write_json(target: Path, data: Any) -> FileEntry:
    """Writes JSON atomically, keys as given, a list of numbers on one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\s+(\d[\d,\s]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
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
