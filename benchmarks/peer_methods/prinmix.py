"""PrinMix (Xiong et al. 2025, arXiv 2506.11087, DeltaMix in its first versions): bits of singular vectors by an integer
program.

From the paper's abstract and its public reviews; neither its text nor its code could be had. What these fix: the error
of a singular vector of V at a width is its singular value squared times the error that the inputs notice; one width
for each vector, the least sum of errors, so many bits for a matrix; V is rounded first, and before U is rounded it is
fitted again to what V has become ("reconstruction target correction"). What they leave open and is decided here: widths
of 0, 2, 3, 4 and 8 bits, U's vectors in the width of V's, no cap on how many widths a matrix uses, GPTQ as for
Delta-CoMe, whose budget, counting and packed inference it shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peer_methods.deltacome import DEFAULT, coded, svd_bits
from peer_methods.deltas import Coded, Delta
from peer_methods.grids import grid

WIDTHS = (0, 2, 3, 4, 8)


def prin_mix(delta: Delta, budget: float = DEFAULT, *, count_scales: bool = True) -> Coded:
    """Args: budget: share of the matrix's bytes in 16 bits."""
    shape, one = delta.weight.shape, torch.ones(1, dtype=torch.long)
    costs = [svd_bits(b * one, shape) if count_scales else b * sum(shape) for b in WIDTHS]
    allowed = int(16 * delta.numbers * budget)
    most = min(len(delta.s), allowed // costs[1])  # the least singular values are left out, as in the paper
    chosen = allocated(_errors(delta, most), torch.tensor(costs), allowed)
    return coded(delta, torch.tensor(WIDTHS)[chosen], correct=True)


def _errors(delta: Delta, rank: int) -> Tensor:
    """[rank, widths]: sigma^2 d XX^T d^T, with d what rounding to a width does to a row of V^T."""
    moments, vh = delta.moments().matrix, delta.vh[:rank]
    lost = []
    for width in WIDTHS:
        rows = vh - grid(vh, torch.full((rank,), width)).round(vh)
        lost.append(delta.s[:rank].square() * ((rows @ moments) * rows).sum(1))
    return torch.stack(lost, dim=1)


def allocated(errors: Tensor, costs: Tensor, budget: int) -> Tensor:
    """The width of every vector with the least sum of errors within a budget.

    The integer program's Lagrangian: what it misses of the optimum is less than one vector's change of width. What is
    left of the budget goes where it helps most.

    Args:
        errors: [r, widths]. costs: [widths], rising, the first one 0.

    Returns:
        Indices of widths, [r].
    """
    low, high = 0.0, float(errors.max()) + 1.0
    for _ in range(100):
        price = (low + high) / 2
        spent = int(costs[(errors + price * costs).argmin(1)].sum())
        low, high = (low, price) if spent <= budget else (price, high)
    chosen = (errors + high * costs).argmin(1)
    while True:
        left = budget - int(costs[chosen].sum())
        gain = errors.gather(1, chosen[:, None]) - errors
        gain[costs[None, :] - costs[chosen][:, None] > left] = -torch.inf
        if float(gain.max()) <= 0:
            return chosen
        row, width = divmod(int(gain.argmax()), len(costs))
        chosen[row] = width
