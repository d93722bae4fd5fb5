"""How a tensor is stored in a GGUF file: the blocks of a type, and what it is stored as where these do not fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...engine.llamacpp.folder import Kind
from ...errors import needs_extra

# Types that the `gguf` package can write. Others need llama.cpp's `llama-quantize`.
WRITABLE: tuple[Kind, ...] = ("f32", "bf16", "f16", "q8_0")
# The type of adapters over a base of another one: factors are small, and 8 bits of them change nothing that was
# measured.
ADAPTER_TYPES: dict[Kind, Kind] = {"f32": "f32", "bf16": "f16", "f16": "f16", "q8_0": "q8_0", "q4_k_m": "q8_0"}
# GGUF's number of a file's type (llama.h, LLAMA_FTYPE).
FILE_TYPES: dict[Kind, int] = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def stored_type(kind: Kind, shape: tuple[int, ...]) -> Any:
    """The type of one tensor: vectors stay whole, and rows that are no whole blocks are f16."""
    with needs_extra("gguf"):
        import gguf
    types = gguf.GGMLQuantizationType
    if len(shape) < 2:
        return types.F32
    wanted = types[kind.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return types.F16 if shape[-1] % block else wanted


def packed(tensor: Tensor, stored: Any) -> npt.NDArray[Any]:
    """A tensor's bytes in a type, in rows."""
    from gguf.quants import quantize

    array: npt.NDArray[Any] = quantize(np.ascontiguousarray(tensor.detach().float().cpu().numpy()), stored)
    return array


def packed_bytes(shape: tuple[int, ...], stored: Any) -> int:
    """Bytes of a tensor in a type."""
    import gguf

    block, size = (int(number) for number in gguf.GGML_QUANT_SIZES[stored])
    return math.prod(shape) // block * size
