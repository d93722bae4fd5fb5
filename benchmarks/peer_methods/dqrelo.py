"""D-QReLO (Li et al., Findings of ACL 2026, arXiv 2604.16940): one bit a number, and what that leaves at low rank.

From the paper's abstract; its text and code could not be had. What it fixes: "coarse-grained one-bit quantization" of
the delta, then a "residual low-rank approximation" of the rest, without data or training. Decided here: one scale a
matrix (as BitDelta's: the mean magnitude, which is the nearest), the residual's best factors in 16 bits, and the rank
that a budget leaves beside the one bit. In what way the paper's residual is "compensated" is not known and left out.
Nor is its inference: taken is what is stored.
"""

from __future__ import annotations

from peer_methods import bitdelta
from peer_methods.deltas import Coded, Delta, factor_bytes
from peer_methods.grids import SCALE_BITS, packed_bytes
from peer_methods.task import STORED
from polymerge.method.rsvd import rsvd


def sign_bytes(delta: Delta) -> int:
    """Of the signs, in whole bytes a row, and the scale."""
    rows, columns = delta.weight.shape
    return rows * packed_bytes(columns) + packed_bytes(SCALE_BITS)


def bit_delta(delta: Delta) -> Coded:
    """BitDelta (see `bitdelta`). Its kernel reads the signs; a GGUF has no place for them."""
    kept = bitdelta.decode(*bitdelta.encode(delta.delta), delta.weight.shape[1])
    return Coded(delta.base + kept, sign_bytes(delta), sign_bytes(delta), None)


def d_qrelo(delta: Delta, budget: float) -> Coded:
    """Args: budget: share of the matrix's bytes in 16 bits, more than a sixteenth."""
    signs = bit_delta(delta)
    rank = delta.rank_for(max(0.0, budget - signs.disk / (2 * delta.numbers)))
    weight = signs.weight
    if rank:
        b, a = rsvd(delta.weight - weight, rank, seed=delta.seed)
        weight = weight + b.to(STORED).float() @ a.to(STORED).float()
    size = signs.disk + factor_bytes(rank, delta.weight)
    return Coded(weight, size, size, None)
