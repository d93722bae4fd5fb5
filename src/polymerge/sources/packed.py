"""Weights in 8 bits as compressed-tensors stores them (`pack-quantized`), written and read.

A matrix [out, in] is whole numbers from -128 to 127 with a scale a row: `weight_packed`, four numbers in an int32, the
first in the lowest bits, each plus 128; `weight_scale` [out, 1]; `weight_shape`. Rounding is to the nearest, without
calibration. Knows nothing of bundles; what else compressed-tensors may store is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError
from .checkpoint import Checkpoint, TensorInfo

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
HALF = 128
EACH = 4  # numbers in an int32


def quantise_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest whole numbers, int8 [out, in], and scales [out, 1] in `dtype`, of a matrix [out, in].

    The numbers are chosen for the scale as it is stored, so its own rounding is lost once.
    """
    whole = weight.float()
    scale = (whole.abs().amax(dim=1, keepdim=True) / (HALF - 1)).to(dtype)
    numbers = whole / torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return numbers.round_().clamp_(-HALF, HALF - 1).to(torch.int8), scale


def dequantise_rows(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, in] in `dtype`: the products, rounded once."""
    return (numbers.float() * scale.float()).to(dtype)


def pack(numbers: Tensor) -> Tensor:
    """int8 [out, in] -> int32 [out, ceil(in / 4)]"""
    shifted = (numbers.to(torch.int16) + HALF).to(torch.uint8)
    padded = torch.nn.functional.pad(shifted, (0, -numbers.shape[1] % EACH))
    return padded.contiguous().view(torch.int32)  # little endian, as safetensors are


def unpack(packed: Tensor, columns: int) -> Tensor:
    """int32 [out, n] -> int8 [out, columns]"""
    shifted = packed.contiguous().view(torch.uint8)[:, :columns]
    return (shifted.to(torch.int16) - HALF).to(torch.int8)


def quantisation_of(kept: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of a config.json whose linear layers are stored so, but for the modules that are kept."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": sorted(kept),
    }


class PackedCheckpoint(Checkpoint):
    """Another checkpoint, with its packed matrices as what they stand for, under the names of the architecture.

    Raises:
        SourceError: they are stored in another way than this file writes.
    """

    def __init__(self, stored: Checkpoint, dtype: torch.dtype) -> None:
        self.label, self.folder, self.origin, self.config = stored.label, stored.folder, stored.origin, stored.config
        self._stored, self._dtype = stored, dtype
        self._check(stored.config.get("quantization_config"))
        self.tensors = dict(self._unpacked(stored.tensors))

    def _check(self, settings: Any) -> None:
        ours = quantisation_of(())
        if not isinstance(settings, Mapping) or any(settings.get(k) != v for k, v in ours.items() if k != "ignore"):
            raise SourceError(f"{self.folder}/config.json: quantization_config is not what `quantize` writes")

    def _unpacked(self, tensors: Mapping[str, TensorInfo]) -> Iterable[tuple[str, TensorInfo]]:
        for name, info in tensors.items():
            weight = name.removesuffix(PACKED)
            if weight == name and not self._beside(name):
                yield name, info
            elif weight != name:
                yield weight, replace(info, shape=self._shape_of(weight, info), dtype=self._dtype, stored_as="I8")

    def _beside(self, name: str) -> bool:
        """Whether a tensor is there to unpack another."""
        return any(
            name.endswith(end) and name.removesuffix(end) + PACKED in self._stored.tensors for end in (SCALE, SHAPE)
        )

    def _shape_of(self, weight: str, packed: TensorInfo) -> tuple[int, int]:
        shape = self._stored.tensors.get(weight + SHAPE), self._stored.tensors.get(weight + SCALE)
        sizes = tuple(self._stored.read(weight + SHAPE).tolist()) if all(shape) else ()
        if len(sizes) != 2 or packed.shape != (sizes[0], math.ceil(sizes[1] / EACH)):
            raise SourceError(f"{self.label}: {weight!r} is packed as {list(packed.shape)}, which is not {list(sizes)}")
        return sizes[0], sizes[1]

    def read(self, name: str) -> Tensor:
        if name in self._stored.tensors:
            return self._stored.read(name)
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._stored.tensors:
            return self._stored.read_rows(name, start, stop)
        return dequantise_rows(*self.numbers(name, start, stop), self._dtype)

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is stored in 8 bits."""
        return name + PACKED in self._stored.tensors

    def numbers(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows of a packed matrix as they are stored: int8 [rows, in] and scales [rows, 1]."""
        stop = self.tensors[name].shape[0] if stop is None else stop
        packed = self._stored.read_rows(name + PACKED, start, stop)
        scale = self._stored.read_rows(name + SCALE, start, stop)
        return unpack(packed, self.tensors[name].shape[1]), scale

    def fingerprint(self) -> list[str]:
        return self._stored.fingerprint()
