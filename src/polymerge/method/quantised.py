"""Codes of small whole numbers with scales: int8 and int4.

Fewer bits a number buy more rank for the same bytes: the spectrum of a fine-tuning residual falls so slowly that what
a larger rank adds is far more than what rounding to four bits loses (docs/codes.md has the figures).

Pure functions on tensors. Knows nothing of experts, files or bundles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .code import Code, check_tensor
from .krylov import krylov
from .rsvd import rank_for_rate

# A compress rate is a budget of bytes: those of the published factors at 16 bits a number.
BUDGET_BYTES = 2
# At most so many numbers of one component share a scale: few enough for one large number to spoil little, many enough
# for the scale to cost an eighth of a bit a number.
GROUP = 128
# A scale has float32's range in two bytes. Its own rounding is made good by the whole numbers, chosen after it.
SCALE_DTYPE = torch.bfloat16
# Shares of a group's largest magnitude that are tried as the end of its range. With few bits it pays to clip.
RANGES = (1.0, 0.9, 0.8)
# Numbers that a CPU rounds at once: a dozen passes over as many stay in its cache.
SLAB = 2**16


@dataclass(frozen=True)
class Quantised(Code):
    """Whole numbers of `bits` bits, each group of a component's numbers with a scale.

    A component is a row of A and a column of B, which is stored as a row too. Its numbers are alike in size, those of
    two components are not, so a group lies within one component. Then it does not matter how the singular values are
    shared between the factors, and rounding to the nearest is near the best for the product, because components of an
    SVD are orthogonal: an error in one cannot make good an error in another.
    """

    bits: int

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def kernel_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(f"lora_{factor}.{part}" for factor in "AB" for part in (self.name, f"{self.name}_scale"))

    def rank(self, out_features: int, in_features: int, compress_rate: float) -> int:
        published = rank_for_rate(out_features, in_features, compress_rate)
        budget = published * (out_features + in_features) * BUDGET_BYTES
        return min(budget // self.bytes(out_features, in_features, 1), out_features, in_features)

    def bytes(self, out_features: int, in_features: int, rank: int) -> int:
        widths = (self._packed(n) + _groups(n) * SCALE_DTYPE.itemsize for n in (out_features, in_features))
        return rank * sum(widths)

    def factorise(
        self, matrix: Tensor, rank: int, *, n_oversamples: int, n_iter: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        return krylov(matrix, rank, n_oversamples=n_oversamples, n_iter=n_iter, seed=seed)

    def encode(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:
        stored = {}
        for factor, rows in (("A", a), ("B", b.T)):
            numbers, scales = quantise(rows, self.bits)
            stored[f"lora_{factor}.{self.name}"] = pack(numbers, self.bits)
            stored[f"lora_{factor}.{self.name}_scale"] = scales
        return stored

    def check(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        rank = stored[self.suffixes[0]].shape[:1].numel()
        for factor, width in (("A", in_features), ("B", out_features)):
            numbers, scales = f"lora_{factor}.{self.name}", f"lora_{factor}.{self.name}_scale"
            check_tensor(numbers, stored[numbers], torch.uint8, (rank, self._packed(width)))
            check_tensor(scales, stored[scales], SCALE_DTYPE, (rank, _groups(width)))

    def decode(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        self.check(stored, out_features, in_features)
        rows = {}
        for factor, width in (("A", in_features), ("B", out_features)):
            packed, scales = stored[f"lora_{factor}.{self.name}"], stored[f"lora_{factor}.{self.name}_scale"]
            rows[factor] = decoded(packed, scales, self.bits, width)
        return rows["B"].T, rows["A"]

    def _packed(self, count: int) -> int:
        return -(-count * self.bits // 8)


def int8(dtype: torch.dtype) -> Code:
    """Whole numbers of 8 bits, whatever the dtype of the bundle."""
    return Quantised(8)


def int4(dtype: torch.dtype) -> Code:
    """Whole numbers of 4 bits, whatever the dtype of the bundle."""
    return Quantised(4)


def quantise(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Nearest whole numbers for scales near those that leave the smallest squared error in every group.

    A number q stands for (q + 1/2 - 2^(bits-1)) times its group's scale: levels lie symmetric around zero, which costs
    no second number a group and is the better choice for numbers that are symmetric themselves (measured: an offset a
    group gains less than its bytes are worth).

    Args:
        rows: [r, n], float32.

    Returns:
        q [r, n] uint8 and scales [r, ceil(n / 128)] bfloat16.
    """
    if rows.device.type != "cpu" or len(rows) <= (slab := max(1, SLAB // rows.shape[1])):
        return _quantise(rows, bits)
    numbers, scales = zip(*(_quantise(part, bits) for part in torch.split(rows, slab)), strict=True)
    return torch.cat(numbers), torch.cat(scales)


def _quantise(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    r, n = rows.shape
    size = group_size(n)
    groups = F.pad(rows.contiguous(), (0, -n % size)).view(r, -1, size)
    half = 2 ** (bits - 1)
    largest = groups.abs().amax(-1, keepdim=True)
    scale = best = torch.zeros_like(largest)
    for share in RANGES:
        levels = _levels(groups, largest * (share / (half - 0.5)), half)
        # the scale nearest for given levels is <g, l> / <l, l>; the gain, squared, is what it takes off the error
        dot, square = (groups * levels).sum(-1, keepdim=True), levels.square().sum(-1, keepdim=True)
        gain = dot / square.sqrt()
        scale = torch.where(gain > best, dot / square, scale)
        best = torch.maximum(gain, best)
    scale = scale.to(SCALE_DTYPE)
    numbers = _levels(groups, scale.float(), half).add_(half - 0.5).to(torch.uint8)
    return numbers.view(r, -1)[:, :n], scale.squeeze(-1)


def dequantise(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """q [r, n] and scales [r, ceil(n / 128)] -> [r, n] float32."""
    levels = numbers.float().sub_(2 ** (bits - 1) - 0.5)
    return _scaled(levels, scales, numbers.shape[1])


def decoded(packed: Tensor, scales: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` and `quantise` made of rows: [r, count] float32, as `dequantise` gives it.

    Of two numbers in a byte both levels are looked up at once, which a CPU does in less than half of the time.
    """
    if bits != 4:
        return dequantise(unpack(packed, bits, count), scales, bits)
    pairs = torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None]
    levels = unpack(pairs, bits, 2).float().sub_(7.5).view(torch.float64)[:, 0]  # two levels of 4 bytes as one of 8
    looked_up = levels.index_select(0, packed.flatten().int()).view(torch.float32).view(len(packed), -1)
    return _scaled(looked_up, scales, count)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Whole numbers under 2^bits, [r, n] uint8 -> [r, ceil(n * bits / 8)] uint8, the first in the lowest bits."""
    each = 8 // bits
    if each == 1:
        return numbers.contiguous()
    parts = F.pad(numbers, (0, -numbers.shape[1] % each))
    packed = parts[:, ::each].clone()
    for place in range(1, each):
        packed |= parts[:, place::each] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of every row of `pack`'s result."""
    if bits == 8:
        return packed[:, :count]
    places = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(places, dim=-1).flatten(1)[:, :count]


def _scaled(levels: Tensor, scales: Tensor, count: int) -> Tensor:
    """The first `count` levels of every row times their group's scale; may write to the levels."""
    size = group_size(count)
    padded = F.pad(levels, (0, more)) if (more := scales.shape[1] * size - levels.shape[1]) else levels
    padded.view(len(levels), -1, size).mul_(scales.float()[:, :, None])
    return padded[:, :count].contiguous()


def _levels(groups: Tensor, scale: Tensor, half: int) -> Tensor:
    """The level nearest to every number, in units of the scale: -half + 1/2 ... half - 1/2."""
    tiny = torch.finfo(torch.float32).tiny
    return (groups / scale.clamp_min(tiny)).floor_().clamp_(-half, half - 1).add_(0.5)


def _groups(count: int) -> int:
    return -(-count // GROUP)


def group_size(count: int) -> int:
    """Groups of one row are equally long, so that next to no padding takes part in the choice of a scale."""
    return -(-count // _groups(count))
