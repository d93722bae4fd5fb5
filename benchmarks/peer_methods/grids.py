"""Uniform levels in groups, with a scale and a zero point a group: what "round to nearest" means in the delta papers.

A grid is chosen once, from the numbers as they are; whoever rounds (to the nearest, or GPTQ) uses it. Knows rows of
numbers; does not know what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128
SCALE_BITS = 16
# Shares of a group's range that are tried. With two bits it pays to clip; GPTQ calls the same search `mse`.
RANGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Grid:
    """Levels of every number of a matrix: scale, zero and the highest level, all of the matrix's shape."""

    scale: Tensor
    zero: Tensor
    top: Tensor

    def __getitem__(self, at: int | Tensor) -> Grid:
        return Grid(self.scale[at], self.zero[at], self.top[at])

    def contiguous(self) -> Grid:
        return Grid(self.scale.contiguous(), self.zero.contiguous(), self.top.contiguous())

    @property
    def T(self) -> Grid:
        return Grid(self.scale.T, self.zero.T, self.top.T)

    def round(self, numbers: Tensor) -> Tensor:
        """The nearest levels' values."""
        level = ((numbers / self.scale).round_() + self.zero).clamp_min_(0.0).minimum(self.top)
        return level.sub_(self.zero).mul_(self.scale)


def grid(rows: Tensor, bits: Tensor, group: int = GROUP) -> Grid:
    """The grid of rows [r, n] with bits [r] a number each, in groups of a row, of the least squared error.

    Args:
        bits: whole numbers; a row of 0 bits has no levels.
    """
    width = rows.shape[1]
    padded = F.pad(rows, (0, -width % group)).view(len(rows), -(-width // group), group)  # [r, groups, group]
    low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
    top = (2.0**bits - 1)[:, None, None].expand_as(low)
    best, error = _range(low, high, top, 1.0), torch.full_like(low, torch.inf)
    for share in RANGES:
        tried = _range(low, high, top, share)
        lost = (tried.round(padded) - padded).square().sum(-1, keepdim=True)
        better = lost < error
        error = torch.where(better, lost, error)
        best = Grid(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero), best.top)
    spread = (part.expand_as(padded).flatten(1)[:, :width] for part in (best.scale, best.zero, best.top))
    return Grid(*spread)


def vector_bits(width: int, bits: int, group: int = GROUP) -> int:
    """Of a row of numbers: levels, and a scale in 16 bits and a zero point a group."""
    return width * bits + -(-width // group) * (SCALE_BITS + bits) if bits else 0


def packed_bytes(bits: int) -> int:
    """Of so many bits that lie one behind the other."""
    return -(-bits // 8)


def _range(low: Tensor, high: Tensor, top: Tensor, share: float) -> Grid:
    scale = (share * (high - low) / top.clamp(min=1)).half().float().clamp(min=2.0**-24)
    return Grid(scale, (-share * low / scale).round().clamp_min(0.0).minimum(top), top)
