"""Writes a GGUF file one tensor at a time: names, shapes and types are known before the first value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import needs_extra
from .types import packed, packed_bytes


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
        type: gguf's.
        read: makes its values, when it is its turn.
    """

    name: str
    shape: tuple[int, ...]
    type: Any
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return packed_bytes(self.shape, self.type)


def write_gguf(file: Path, architecture: str, describe: Callable[[Any], None], tensors: Iterable[Stored]) -> None:
    """Writes a file.

    Args:
        describe: adds the metadata to gguf's writer.
    """
    with needs_extra("gguf"):
        import gguf
    writer, tensors = gguf.GGUFWriter(file, architecture), list(tensors)
    describe(writer)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("float32"), tensor.bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(packed(tensor.read(), tensor.type))
    writer.close()
