"""Delta-CoMe (Ping et al., NeurIPS 2024, arXiv 2406.08903): singular vectors of the delta in mixed precision.

From the paper and the settings of its repository (thunlp/Delta-CoMe, run.sh), not from its code: the first 2 singular
vectors of each side in 8 bits, the next 32 in 3, as many as the budget pays in 2; GPTQ with groups of 128, V first and
then U for the inputs that the rounded S V^T gives; singular values in 16 bits. The published budget is a sixteenth of
the delta's 16 bits, which does not count scales; they are counted here.

Otherwise than there: groups lie along singular vectors for U too, ranges are searched for the least error (with plain
minima and maxima two bits are much worse), and see `peer_methods.gptq` on the calibration. Its inference reads the
packed vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peer_methods.deltas import Coded, Delta, factor_bytes, largest
from peer_methods.grids import SCALE_BITS, grid, packed_bytes, vector_bits
from polymerge.method.gptq import Moments, gptq

WIDTHS = ((2, 8), (32, 3))
REST = 2
DEFAULT = 1 / 16


def delta_come(delta: Delta, budget: float = DEFAULT, *, count_scales: bool = True) -> Coded:
    """Args: budget: share of the matrix's bytes in 16 bits."""
    shape, allowed = delta.weight.shape, 16 * delta.numbers * budget
    cost = svd_bits if count_scales else _published_bits
    rank = largest(lambda r: cost(widths(r), shape), len(delta.s), allowed)
    return coded(delta, widths(rank))


def widths(rank: int) -> Tensor:
    """Bits of every singular vector."""
    bits = torch.full((rank,), REST)
    first = 0
    for count, width in WIDTHS:
        bits[first : first + count] = width
        first += count
    return bits


def svd_bits(bits: Tensor, shape: torch.Size) -> int:
    """Of the singular vectors of both sides with so many bits each, their scales and singular values."""
    kept = [int(b) for b in bits if b]
    return sum(vector_bits(n, b) for b in kept for n in shape) + SCALE_BITS * len(kept)


def _published_bits(bits: Tensor, shape: torch.Size) -> int:
    return int(bits.sum()) * sum(shape)


def coded(delta: Delta, bits: Tensor, *, correct: bool = False) -> Coded:
    """The delta's singular vectors in so many bits each, those of 0 bits left out.

    Args:
        correct: fit U again to the rounded V before it is rounded.
    """
    kept = bits.nonzero().flatten()
    bits, vh, s = bits[kept], delta.vh[kept], delta.s[kept].half().float()
    a = s[:, None] * gptq(vh, delta.moments(), grid(vh, bits))  # [r, in]
    inputs = delta.moments().matrix @ a.T  # [in, r]
    u = _fitted(delta.delta, inputs, a) if correct else delta.u[:, kept]
    rounded = gptq(u, Moments(a @ inputs), grid(u.T, bits).T)
    size = packed_bytes(svd_bits(bits, delta.weight.shape))
    return Coded(delta.base + rounded @ a, size, size, factor_bytes(len(kept), delta.weight))


def _fitted(delta: Tensor, inputs: Tensor, a: Tensor) -> Tensor:
    """The U with the least ||(delta - U a) X||, where inputs = X X^T a^T."""
    gram = (a @ inputs).double()
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    u: Tensor = torch.linalg.solve(gram, (delta @ inputs).double().T).T
    return u.float()
