"""Low-rank factors in 16 bits: of the delta from the base, the baseline of every paper here, and Split-Merge's.

Split-Merge (Gorantla et al., EMNLP 2025, main.1533), from its abstract; its text and code could not be had. What it
fixes: what experts have in common is averaged, and of what is each expert's own "only principal components and scalar
multipliers" are kept. Read here as: the residual from the average at low rank, and one number for each matrix that
gives it the residual's length again. The best number in the Frobenius norm would be 1, and the row would be polymerge's
published code without its scales. Its router is left out: the expert is named.
"""

from __future__ import annotations

from torch import Tensor

from peer_methods.deltas import Coded, Delta, factor_bytes
from peer_methods.grids import SCALE_BITS, packed_bytes
from peer_methods.task import STORED
from polymerge.method.rsvd import rsvd


def truncated(delta: Delta, budget: float) -> Coded:
    """The best factors of the delta. Args: budget: share of the matrix's bytes in 16 bits."""
    rank = delta.rank_for(budget)
    b, a = delta.u[:, :rank], delta.s[:rank, None] * delta.vh[:rank]
    size = factor_bytes(rank, delta.weight)
    return Coded(delta.base + _product(b, a), size, size, size)


def split_merge(delta: Delta, budget: float) -> Coded:
    """Args: budget: share of the matrix's bytes in 16 bits."""
    rank, average = delta.rank_for(budget), delta.average()
    residual = delta.weight - average
    kept = _product(*rsvd(residual, rank, seed=delta.seed))
    longer = residual.norm() / kept.norm().clamp(min=1e-30)
    factors = factor_bytes(rank, delta.weight)
    size = factors + packed_bytes(SCALE_BITS)
    return Coded(average + longer * kept, size, size, factors)


def _product(b: Tensor, a: Tensor) -> Tensor:
    return b.to(STORED).float() @ a.to(STORED).float()
