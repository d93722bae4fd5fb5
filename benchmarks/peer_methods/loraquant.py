"""LoRAQuant (Mirzaei et al. 2025, arXiv 2510.26690): an adapter's first components in two bits, the others in one.

From the paper and the settings of its repository (Anonymous890920/LoRAQuant, README), not from its code: the SVD of B A
with sqrt(S) in both factors; the first components that hold 0.8 of the squared singular values in 2 bits, to the
nearest, the others as signs with a mean magnitude; groups of 128 along A's rows and B's columns. It is a method for
LoRA adapters, and these experts have none: its adapter is the truncated SVD of the delta, of rank 16 as there or of the
rank that a budget pays. Its gradient steps on each component of the first part are replaced by a search for each
group's range. Its code runs the adapter in 16 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_methods.deltas import Coded, Delta, factor_bytes, largest
from peer_methods.grids import GROUP, SCALE_BITS, grid, packed_bytes, vector_bits

HIGH_BITS, SHARE, RANK = 2, 0.8, 16


def lora_quant(delta: Delta, budget: float | None = None) -> Coded:
    """Args: budget: share of the matrix's bytes in 16 bits; None for the published rank."""
    shape, energy = delta.weight.shape, delta.s.double().square().cumsum(0)
    rank = min(RANK, len(delta.s))
    if budget is not None:
        rank = largest(lambda r: _bits(r, _high(energy, r), shape), len(delta.s), 16 * delta.numbers * budget)
    high = _high(energy, rank)
    root = delta.s[:rank].sqrt()
    b, a = (_rounded(root[:, None] * part[:rank], high) for part in (delta.u.T, delta.vh))
    size = packed_bytes(_bits(rank, high, shape))
    factors = factor_bytes(rank, delta.weight)
    return Coded(delta.base + b.T @ a, size, factors, factors)


def _high(energy: Tensor, rank: int) -> int:
    """How many of the first `rank` components hold the share of their energy."""
    return int((energy[:rank] < SHARE * energy[rank - 1]).sum()) + 1 if rank else 0


def _bits(rank: int, high: int, shape: torch.Size) -> int:
    signs = sum(n + -(-n // GROUP) * SCALE_BITS for n in shape)
    return high * sum(vector_bits(n, HIGH_BITS) for n in shape) + (rank - high) * signs


def _rounded(rows: Tensor, high: int) -> Tensor:
    """Components as rows [r, n]: the first ones on a grid, of the others signs and a mean magnitude a group."""
    first = rows[:high]
    return torch.cat([grid(first, torch.full((high,), HIGH_BITS)).round(first), _signs(rows[high:])])


def _signs(rows: Tensor) -> Tensor:
    width = rows.shape[1]
    groups = F.pad(rows, (0, -width % GROUP)).view(len(rows), -(-width // GROUP), GROUP)
    counts = F.pad(torch.ones(width), (0, -width % GROUP)).view(-1, GROUP).sum(-1)
    means = (groups.abs().sum(-1) / counts).half().float()
    signs: Tensor = (groups.sign() * means[..., None]).flatten(1)[:, :width]
    return signs
