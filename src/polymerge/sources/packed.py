"""Weights in 8 or 4 bits as compressed-tensors stores them (`pack-quantized`), written and read.

A matrix [out, in] is whole numbers with a scale a row, or a group of a row: `weight_packed`, an int32 for every four
(eight) of them, the first in the lowest bits, each plus half their range; `weight_scale` [out, 1] or [out, groups];
`weight_shape`. Knows nothing of bundles, nor who rounds; what else compressed-tensors may store is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError
from .checkpoint import Checkpoint, TensorInfo

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
# Shares of a group's largest number that are tried: with four bits it pays to clip.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Form:
    """How matrices are packed.

    Attributes:
        bits: of a number, 8 or 4.
        group: how many numbers of a row share a scale; None for all of them.
    """

    bits: int
    group: int | None = None

    @property
    def code(self) -> str:
        """As a manifest says it."""
        return f"int{self.bits}"

    @property
    def half(self) -> int:
        """Numbers are from -half to half - 1."""
        return int(2 ** (self.bits - 1))

    @property
    def each(self) -> int:
        """Numbers in an int32."""
        return 32 // self.bits

    def takes(self, columns: int) -> bool:
        """Whether a row of so many numbers has whole groups."""
        return self.group is None or columns % self.group == 0

    def packed_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, math.ceil(columns / self.each)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns // self.group if self.group else 1

    def settings(self, kept: Iterable[str]) -> dict[str, Any]:
        """`quantization_config` of a config.json whose linear layers are stored so, but for the modules kept."""
        strategy = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, **strategy, "dynamic": False}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
            "ignore": sorted(kept),
        }


EIGHT_BITS = Form(8)
# Group sizes that vLLM's kernels have, the best of them for bytes first.
GROUPS = (128, 64, 32)


def four_bits(columns: Iterable[int]) -> Form:
    """Groups as large as all rows of so many numbers allow that allow any."""
    widths = [width for width in columns if width % GROUPS[-1] == 0]
    return Form(4, next(group for group in GROUPS if all(width % group == 0 for width in widths)))


def form_of(settings: Any) -> Form | None:
    """Of a `quantization_config`; None where it is none that `Form.settings` writes."""
    try:
        weights = settings["config_groups"]["group_0"]["weights"]
        form = Form(int(weights["num_bits"]), weights.get("group_size"))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    alike = form.bits in (4, 8) and all(settings.get(k) == v for k, v in form.settings(()).items() if k != "ignore")
    return form if alike else None


@dataclass(frozen=True)
class Grid:
    """The values that a matrix's numbers may take (`polymerge.method.gptq.Levels`): a scale a number, in the matrix's
    shape, times -half to half - 1."""

    scale: Tensor
    half: int

    def __getitem__(self, at: int | Tensor) -> Grid:
        return Grid(self.scale[at], self.half)

    @property
    def T(self) -> Grid:
        return Grid(self.scale.T, self.half)

    def contiguous(self) -> Grid:
        return Grid(self.scale.contiguous(), self.half)

    def numbers(self, values: Tensor) -> Tensor:
        """The nearest whole numbers, in float32."""
        scale = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        return (values / scale).round_().clamp_(-self.half, self.half - 1)

    def round(self, numbers: Tensor) -> Tensor:
        return self.numbers(numbers).mul_(self.scale)


def scales_of(weight: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """Scales in `dtype` of a matrix [out, in], [out, 1] or [out, groups]. With four bits, of the least squared error.

    They are rounded to `dtype` before a number is chosen, so that rounding is lost once.
    """
    groups = weight.float().view(len(weight), -1, form.group or weight.shape[1])
    largest = groups.abs().amax(-1) / (form.half - 1)
    best, least = _stored(largest, dtype), torch.full_like(largest, torch.inf)
    for share in RANGES if form.bits < 8 else ():
        tried = _stored(share * largest, dtype)
        grid = Grid(tried.float()[..., None].expand_as(groups), form.half)
        lost = (grid.round(groups) - groups).square().sum(-1)
        best, least = torch.where(lost < least, tried, best), torch.minimum(lost, least)
    return best


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`; what is too small for all its digits is rounded up, so that it is neither 0 nor clips its numbers."""
    smallest = torch.finfo(dtype).smallest_normal
    step = smallest * torch.finfo(dtype).eps
    return torch.where(scale < smallest, (scale / step).ceil() * step, scale).to(dtype)


def grid_of(scale: Tensor, form: Form, columns: int) -> Grid:
    """Of a matrix with such scales, of so many columns."""
    return Grid(_spread(scale.float(), form, columns), form.half)


def dequantise(numbers: Tensor, scale: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """[rows, in] in `dtype`: the products, rounded once."""
    return (numbers.float() * _spread(scale.float(), form, numbers.shape[1])).to(dtype)


def _spread(scale: Tensor, form: Form, columns: int) -> Tensor:
    return scale.repeat_interleave(form.group, 1) if form.group else scale.expand(-1, columns)


def pack(numbers: Tensor, form: Form) -> Tensor:
    """int8 [out, in] -> int32 [out, ceil(in / each)]"""
    shifted = (numbers.to(torch.int16) + form.half).to(torch.uint8)
    padded = torch.nn.functional.pad(shifted, (0, -numbers.shape[1] % form.each))
    if form.bits == 4:
        padded = padded[:, ::2] | (padded[:, 1::2] << 4)
    return padded.contiguous().view(torch.int32)  # little endian, as safetensors are


def unpack(packed: Tensor, columns: int, form: Form) -> Tensor:
    """int32 [out, n] -> int8 [out, columns]"""
    shifted = packed.contiguous().view(torch.uint8)
    if form.bits == 4:
        shifted = torch.stack((shifted & 15, shifted >> 4), -1).flatten(1)
    return (shifted[:, :columns].to(torch.int16) - form.half).to(torch.int8)


class PackedCheckpoint(Checkpoint):
    """Another checkpoint, with its packed matrices as what they stand for, under the names of the architecture.

    Raises:
        SourceError: they are stored in another way than this file writes.
    """

    def __init__(self, stored: Checkpoint, dtype: torch.dtype) -> None:
        self.label, self.folder, self.origin, self.config = stored.label, stored.folder, stored.origin, stored.config
        self._stored, self._dtype = stored, dtype
        form = form_of(stored.config.get("quantization_config"))
        if form is None:
            raise SourceError(f"{self.folder}/config.json: quantization_config is not what `quantize` writes")
        self.form = form
        self.tensors = dict(self._unpacked(stored.tensors))

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
        scale = self._stored.tensors.get(weight + SCALE)
        sizes = tuple(self._stored.read(weight + SHAPE).tolist()) if weight + SHAPE in self._stored.tensors else ()
        if scale is None or len(sizes) != 2 or packed.shape != self.form.packed_shape(*sizes):
            raise SourceError(f"{self.label}: {weight!r} is packed as {list(packed.shape)}, which is not {list(sizes)}")
        if scale.shape != self.form.scale_shape(*sizes):
            raise SourceError(f"{self.label}: {weight!r} of {list(sizes)} has scales of {list(scale.shape)}")
        return sizes[0], sizes[1]

    def read(self, name: str) -> Tensor:
        if name in self._stored.tensors:
            return self._stored.read(name)
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._stored.tensors:
            return self._stored.read_rows(name, start, stop)
        return dequantise(*self.numbers(name, start, stop), self.form, self._dtype)

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is stored in fewer bits."""
        return name + PACKED in self._stored.tensors

    def numbers(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows of a packed matrix as they are stored: int8 [rows, in] and scales [rows, 1] or [rows, groups]."""
        stop = self.tensors[name].shape[0] if stop is None else stop
        packed = self._stored.read_rows(name + PACKED, start, stop)
        scale = self._stored.read_rows(name + SCALE, start, stop)
        return unpack(packed, self.tensors[name].shape[1], self.form), scale

    def fingerprint(self) -> list[str]:
        return self._stored.fingerprint()
