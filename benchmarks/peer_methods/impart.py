"""ImPart (Yang et al., ACL 2025, arXiv 2504.13237): singular vectors thinned out at random, small ones more.

From the paper and the settings of its repository (X1AOX1A/ImPart, sparsify/), not from its code: the share of a
singular vector's numbers that is dropped rises as its singular value to the power 0.5 falls, from none to what the
compression ratio asks for; the last four fifths of the vectors are dropped whole; what stays is divided by the share
that stays. 16 bits a number that stays; which ones these are follows from a seed. `quantised` is its ImPart-Qt: 2
vectors in 8 bits, 32 in 3 and the rest in 2, as Delta-CoMe, rounded to the nearest (there by GPTQ), in groups of 128
numbers that stay.

ImPart merges each expert into a dense model before it is run; ImPart-Qt runs on Delta-CoMe's kernel, zeros included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peer_methods.deltacome import svd_bits, widths
from peer_methods.deltas import Coded, Delta, factor_bytes
from peer_methods.grids import SCALE_BITS, grid, packed_bytes, vector_bits

DEFAULT, POWER, DROPPED_WHOLE = 1 / 32, 0.5, 0.8


def im_part(delta: Delta, budget: float = DEFAULT, *, quantised: bool = False) -> Coded:
    """Args: budget: share of the matrix's bytes in 16 bits."""
    shape = delta.weight.shape
    cost = _quantised_bits if quantised else _bits
    dropped = _dropped(delta, lambda d: cost(d, shape), 16 * delta.numbers * budget)
    draw = torch.Generator().manual_seed(delta.seed)
    rank = len(dropped)
    u, vh = (_thinned(part[:rank], dropped, quantised, draw) for part in (delta.u.T, delta.vh))
    weight = delta.base + (u.T * delta.s[:rank]) @ vh
    resident = packed_bytes(svd_bits(widths(rank), shape)) if quantised else 2 * delta.numbers
    return Coded(weight, packed_bytes(cost(dropped, shape)), resident, factor_bytes(rank, delta.weight))


def _dropped(delta: Delta, cost: Callable[[Tensor], int], budget: float) -> Tensor:
    """The smallest shares to drop, of every vector that is not dropped whole, that are within the budget."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(shares(delta.s, delta.weight.shape, middle)) <= budget else (middle, high)
    return shares(delta.s, delta.weight.shape, high)


def shares(s: Tensor, shape: torch.Size, gamma: float) -> Tensor:
    """Dropped shares with the mean `gamma` over the vectors that are looked at; those behind the last one are whole.

    A wide matrix has fewer vectors for its size than a square one, and keeps more of them (the repository's 1.45).
    """
    wide = 2 * max(shape) / sum(shape)
    looked_at = max(1, min(len(s), int(len(s) * (1 - DROPPED_WHOLE) * wide + 1e-9)))
    importance = s[:looked_at].double() ** POWER
    dropped = (1 - importance / importance[0].clamp(min=1e-30)) * gamma
    behind = dropped.flip(0)
    # with the last k dropped whole the sum is that of the others, and k
    sums = dropped.sum() - torch.cat([torch.zeros(1), behind.cumsum(0)]) + torch.arange(looked_at + 1)
    whole = int((sums < gamma * looked_at - 1e-9).sum())
    return dropped[: looked_at - whole]


def _kept(dropped: Tensor, width: int) -> list[int]:
    return [width - int(width * share) for share in dropped.tolist()]


def _bits(dropped: Tensor, shape: torch.Size) -> int:
    return 16 * (sum(sum(_kept(dropped, n)) for n in shape) + len(dropped))


def _quantised_bits(dropped: Tensor, shape: torch.Size) -> int:
    bits = widths(len(dropped)).tolist()
    vectors = sum(vector_bits(k, b) for n in shape for k, b in zip(_kept(dropped, n), bits, strict=True))
    return vectors + SCALE_BITS * len(dropped)


def _thinned(rows: Tensor, dropped: Tensor, quantised: bool, draw: torch.Generator) -> Tensor:
    """Rows [r, n] with a random part of each left, divided by its share."""
    width = rows.shape[1]
    places = torch.rand(rows.shape, generator=draw).argsort(1)
    stays = torch.arange(width) < torch.tensor(_kept(dropped, width))[:, None]
    numbers = torch.where(stays, rows.gather(1, places), 0.0)  # those that stay lie together
    if quantised:
        numbers = torch.where(stays, grid(numbers, widths(len(rows))).round(numbers), 0.0)
    else:
        numbers = numbers.half().float()
    return torch.zeros_like(rows).scatter_(1, places, numbers / (1 - dropped).float()[:, None])
