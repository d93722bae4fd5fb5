"""What a file's bytes are, told from few of them: its size, its header, and samples.

Two files of weights that differ in a tensor differ in the samples of that tensor; names and times, which a copy or an
image layer changes or levels, do not count. A change of single numbers between the samples is not seen: whoever must
see that hashes the whole file, as a bundle's manifest does. Knows bytes and safetensors' header.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from ..errors import SourceError

SAMPLE = 4096  # bytes
SAMPLES = 256  # of a file, evenly; and one in the middle of every tensor where the header says where that is
LARGEST_HEADER = 100_000_000  # safetensors' own limit
# What stands beside weights and changes what a model answers.
BESIDE = (".json", ".jinja", ".model", ".txt", ".py")


def digest_of(file: Path) -> str:
    """SHA-256 over size, header and samples. Raises SourceError where the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            digest.update(str(size).encode())
            for start, stop in _ranges(handle, size):
                handle.seek(start)
                digest.update(handle.read(stop - start))
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def digest_beside(folder: Path) -> str:
    """SHA-256 over what lies beside the weights in a checkpoint's folder: configuration, tokenizer, templates, code."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in BESIDE and file.is_file()):
        digest.update(f"{file.name} {digest_of(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _ranges(handle: BinaryIO, size: int) -> Iterable[tuple[int, int]]:
    if size <= SAMPLES * SAMPLE:
        return [(0, size)]
    step = (size - SAMPLE) / (SAMPLES - 1)
    starts = {round(step * number) for number in range(SAMPLES)}
    header, tensors = _safetensors(handle, size)
    middles = {max(0, (start + stop - SAMPLE) // 2) for start, stop in tensors}
    return [(0, header), *((start, min(start + SAMPLE, size)) for start in sorted(starts | middles))]


def _safetensors(handle: BinaryIO, size: int) -> tuple[int, list[tuple[int, int]]]:
    """Where the header ends, and where every tensor lies; (0, []) for files of other kinds."""
    (length,) = struct.unpack("<Q", handle.read(8))
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        return 0, []
    try:
        header = json.loads(handle.read(length))
        offsets = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
        return 8 + length, [(8 + length + int(start), 8 + length + int(stop)) for start, stop in offsets]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 0, []
