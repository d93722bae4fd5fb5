"""The block Krylov factorisation: a large rank at half the randomized SVD's products.

A code of few bits has about four times the published rank, and nearly all of a factorisation's time are products of the
matrix with as many columns. The randomized SVD throws away all but the last of its products with them; here every one
stays in the basis, so narrow blocks do what wide ones did (Musco and Musco, "Randomized Block Krylov Methods for
Stronger and Faster Approximate Singular Value Decomposition", 2015, arXiv 1504.05477, algorithm 2). 3 columns are
multiplied for one of the result, 6.6 in `rsvd`.

Pure functions on tensors. Knows nothing of experts, files or bundles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rsvd import check_rank, conditioned, oversampled, rsvd

# Columns of the basis beyond the result's. Fewer leave more of a slow spectrum behind: with 0.4 the error is nearly 1%
# of itself larger, with 0.6 as much smaller (docs/log.md).
OVERSAMPLING_SHARE = 0.5
# Blocks of the basis for one power iteration of the randomized SVD: narrower ones are nearer, and slower to multiply.
BLOCKS = 4
# Of a direction of length one at least so much must be new. Less is rounding alone, and the basis is no longer one.
NEW = 0.5
# A direction that keeps so much of its length lost nothing but rounding, and is orthogonal to the others as it was.
UNTOUCHED = 1 - 1e-6
# Where the smallest singular value is a smaller part of the largest, its direction has too many rounded digits.
WIDE = 0.03


def krylov(
    matrix: Tensor, rank: int, *, n_oversamples: int = 16, n_iter: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A rank-`rank` factorisation U @ V of `matrix` that is close to the best one, as `rsvd` has it.

    Where the matrix has fewer directions than the basis, as the residual of a LoRA expert, it is `rsvd` itself.

    Args:
        matrix: [m, n], float32 or float64, on any device. Not changed.
        rank: 0 < rank <= min(m, n).
        n_oversamples: extra columns of the basis; half of the rank where that is more.
        n_iter: a fourth of the blocks of the basis; without any it is `rsvd` without iterations.
        seed: of the sketch, which is drawn on the CPU so that every device uses the same one.

    Returns:
        U [m, rank] with orthonormal columns and V [rank, n] with orthogonal rows (the singular values are in V).
    """
    m, n = matrix.shape
    check_rank(rank, m, n)
    width = oversampled(rank, n_oversamples, OVERSAMPLING_SHARE, m, n)
    block = -(-width // (BLOCKS * n_iter)) if n_iter else width
    short = matrix.T if m > n else matrix  # its columns are what is made orthogonal
    spanned = _basis(short, width, block, seed) if n_iter else None
    if spanned is None:
        return rsvd(matrix, rank, n_oversamples=n_oversamples, n_iter=n_iter, seed=seed)
    left, right = _truncated(*spanned, rank, block)
    return _turned(left, right) if m > n else (left, right)


def _basis(matrix: Tensor, width: int, block: int, seed: int) -> tuple[Tensor, Tensor] | None:
    """Q^T [width, m], orthonormal, and Q^T A [width, n]; None where A has not so many directions."""
    m, n = matrix.shape
    basis, small = matrix.new_empty(width, m), matrix.new_empty(width, n)
    other = _sums(matrix, block, seed)  # [block, n]
    for first in range(0, width, block):
        last = min(first + block, width)
        fresh = _orthonormal((conditioned(other.T).T @ matrix.T)[: last - first], basis[:first], 2 * block)
        if fresh is None:
            return None
        basis[first:last] = fresh
        other = torch.mm(basis[first:last], matrix, out=small[first:last])
    return basis, small


def _sums(matrix: Tensor, count: int, seed: int) -> Tensor:
    """So many sums of rows that lie together, with random signs: a sketch Omega^T A for one pass over the matrix.
    [m, n] -> [count, n]

    With Gaussian columns A Omega would be the first block; what A makes of these sums is half a power iteration nearer.
    A last few rows, fewer than `count`, are in none.
    """
    each = len(matrix) // count
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count, 1, each), generator=generator).mul_(2).sub_(1).to(matrix)
    sums: Tensor = signs @ matrix[: count * each].view(count, each, -1)
    return sums[:, 0]


def _orthonormal(rows: Tensor, basis: Tensor, near: int) -> Tensor | None:
    """What is new in rows [b, m], orthonormal and orthogonal to those of the basis [k, m]; None if too little is.

    But for rounding, new rows have parts along the last two blocks alone, `near` rows (Lanczos' recurrence). What
    rounding made of that, and what it adds along all others, is taken away once more. One Cholesky factor makes rows
    orthogonal but for some digits, and a second one to the last.
    """
    fresh = _conditioned(_beyond(rows, basis[-near:]))
    if not len(basis):
        return _conditioned(fresh)
    left = _beyond(fresh, basis)
    kept = float((torch.linalg.vector_norm(left, dim=1) / torch.linalg.vector_norm(fresh, dim=1)).min())
    if not kept > NEW:  # not a number, too
        return None
    left = _conditioned(left)
    return left if kept > UNTOUCHED else _conditioned(_beyond(left, basis))


def _conditioned(rows: Tensor) -> Tensor:
    return conditioned(rows.T).T


def _beyond(rows: Tensor, basis: Tensor) -> Tensor:
    """rows (1 - Q Q^T). The basis has Q's columns as rows."""
    return torch.addmm(rows, rows @ basis.T, basis, alpha=-1.0) if len(basis) else rows


def _truncated(basis: Tensor, small: Tensor, rank: int, block: int) -> tuple[Tensor, Tensor]:
    """The best factors U [m, rank] and V [rank, n] within a Krylov basis, as `rsvd.truncated`: Q^T [l, m] and small =
    Q^T A [l, n]. In it Q^T A A^T Q is zero but for neighbouring blocks, of which the lower are what `eigh` reads."""
    gram = torch.zeros(len(small), len(small), dtype=torch.float64, device=small.device)
    before = small.new_empty(0, small.shape[1], dtype=torch.float64)
    for first in range(0, len(small), block):
        wide = small[first : first + block].double()
        last = first + len(wide)
        gram[first:last, first - len(before) : first] = wide @ before.T
        gram[first:last, first:last] = wide @ wide.T
        before = wide
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).to(small.dtype)  # [l, rank], largest first
    return basis.T @ vectors, vectors.T @ small


def _turned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of A^T, as `krylov` returns them -> those of A."""
    sizes = torch.linalg.vector_norm(right, dim=1)
    if float(sizes.min()) > WIDE * float(sizes.max()):
        return (right / sizes[:, None]).T, (left * sizes).T
    q, r = torch.linalg.qr(right.T)
    return q, r @ left.T
