"""The block Krylov factorisation: a large rank at half the randomized SVD's products.

A code of few bits has about four times the published rank, and nearly all of a factorisation's time are products of the
matrix with as many columns. The randomized SVD throws away all but the last of its products with them; here every one
stays in the basis, so narrow blocks do what wide ones did (Musco and Musco, "Randomized Block Krylov Methods for
Stronger and Faster Approximate Singular Value Decomposition", 2015, arXiv 1504.05477, algorithm 2). 3.2 columns are
multiplied for one of the result, 6.6 in `rsvd`.

Pure functions on tensors. Knows nothing of experts, files or bundles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rsvd import check_rank, conditioned, oversampled, rsvd, sketched, truncated

# Columns of the basis beyond the result's. Fewer leave more of a slow spectrum behind: with 0.4 the error is 2% above
# that of two power iterations, with 0.5 1%, with 0.65 it is the same (the shapes and spectra of benchmarks/merge.py).
OVERSAMPLING_SHARE = 0.6
# Blocks of the basis for one power iteration of the randomized SVD: narrower ones are nearer, and slower to multiply.
BLOCKS = 4
# Of a direction of length one at least so much must be new. Less is rounding alone, and the basis is no longer one.
NEW = 0.5
# A direction that keeps so much of its length lost nothing but rounding, and is orthogonal to the others as it was.
UNTOUCHED = 1 - 1e-6


def krylov(
    matrix: Tensor, rank: int, *, n_oversamples: int = 16, n_iter: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A rank-`rank` factorisation U @ V of `matrix` that is close to the best one, as `rsvd` has it.

    Where the matrix has fewer directions than the basis, as the residual of a LoRA expert, it is `rsvd` itself.

    Args:
        matrix: [m, n], float32 or float64, on any device. Not changed.
        rank: 0 < rank <= min(m, n).
        n_oversamples: extra columns of the basis; three fifths of the rank where that is more.
        n_iter: a fourth of the blocks of the basis; without any it is `rsvd` without iterations.
        seed: of the sketch, which is drawn on the CPU so that every device uses the same one.

    Returns:
        U [m, rank] with orthonormal columns and V [rank, n] with orthogonal rows (the singular values are in V).
    """
    m, n = matrix.shape
    check_rank(rank, m, n)
    width = oversampled(rank, n_oversamples, OVERSAMPLING_SHARE, m, n)
    spanned = _basis(matrix, width, BLOCKS * n_iter, seed) if n_iter else None
    if spanned is None:
        return rsvd(matrix, rank, n_oversamples=n_oversamples, n_iter=n_iter, seed=seed)
    return truncated(*spanned, rank)


def _basis(matrix: Tensor, width: int, blocks: int, seed: int) -> tuple[Tensor, Tensor] | None:
    """Q [m, width], orthonormal, and Q^T A [width, n]; None where A has not so many directions."""
    m, n = matrix.shape
    basis, small = matrix.new_empty(width, m), matrix.new_empty(width, n)  # rows, so that a block lies together
    block = -(-width // blocks)
    columns = sketched(matrix, block, seed)  # [m, block]
    for first in range(0, width, block):
        last = min(first + block, width)
        fresh = _orthonormal(columns[:, : last - first], basis[:first], 2 * block)
        if fresh is None:
            return None
        basis[first:last] = fresh.T
        torch.mm(basis[first:last], matrix, out=small[first:last])
        if last < width:
            columns = matrix @ conditioned(small[first:last].T)
    return basis.T, small


def _orthonormal(columns: Tensor, basis: Tensor, near: int) -> Tensor | None:
    """What is new in columns [m, b], orthonormal and orthogonal to the rows of the basis [k, m]; None if too little is.

    But for rounding, new columns have parts along the last two blocks alone, `near` rows (Lanczos' recurrence). What
    rounding made of that, and what it adds along all others, is taken away once more.
    """
    fresh: Tensor = torch.linalg.qr(_beyond(columns, basis[-near:])).Q
    if not len(basis):
        return fresh
    fresh = _beyond(fresh, basis)
    sizes = torch.linalg.vector_norm(fresh, dim=0)
    if not float(sizes.min()) > NEW:  # not a number, too
        return None
    return fresh if float(sizes.min()) > UNTOUCHED else _beyond(torch.linalg.qr(fresh).Q, basis)


def _beyond(columns: Tensor, basis: Tensor) -> Tensor:
    """(1 - Q Q^T) columns. The basis has Q's columns as rows."""
    return torch.addmm(columns, basis.T, basis @ columns, alpha=-1.0) if len(basis) else columns
