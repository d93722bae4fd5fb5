"""The randomized singular value decomposition, and how much rank a compress rate pays for.

Pure functions on tensors. Knows nothing of experts, files or bundles.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

# Oversampling is a share of the rank, with a floor for small ranks: the residuals of fine-tuning have slowly
# falling spectra, where a fixed handful of extra columns stops helping once the rank is in the hundreds.
OVERSAMPLING_SHARE = 0.1
# A column of length one that is nearer than this to the span of those before it makes a Gram matrix in float32 unsafe.
NEAR_DEPENDENT = 0.03


def rank_for_rate(out_features: int, in_features: int, compress_rate: float) -> int:
    """r = floor((1 - c) * out * in / (out + in)): the rank whose factors hold (1 - c) of the matrix's numbers."""
    # The tiny term keeps floor() from losing a rank to the rounding of 1 - c (0.95 -> 0.050000000000000044).
    return math.floor((1.0 - compress_rate) * out_features * in_features / (out_features + in_features) + 1e-9)


def factors_are_smaller(out_features: int, in_features: int, rank: int) -> bool:
    """Whether two factors of this rank cost less than the matrix itself, by at least one rank.

    A rank is a whole number, so at compress rate 0 the formula stops a fraction of a rank short of the full size.
    Within one rank of it the matrix is kept whole: it is no larger, and it is exact.
    """
    return (rank + 1) * (out_features + in_features) <= out_features * in_features


def sketch_seed(seed: int, *names: str) -> int:
    """A 63-bit seed from names, so that no sketch depends on the order of work or the number of workers."""
    text = "\0".join((str(seed), *names)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def rsvd(
    matrix: Tensor, rank: int, *, n_oversamples: int = 16, n_iter: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A rank-`rank` factorisation U @ V of `matrix` that is close to the best one.

    Halko, Martinsson and Tropp, "Finding structure with randomness" (2011, arXiv 0909.4061): algorithm 4.4 (Gaussian
    sketch, power iterations, re-orthonormalised after every product) for the range, then the exact truncation inside
    it. The last step needs only the left singular vectors of the small matrix B = Q^T A [l, n], which are the
    eigenvectors of B B^T [l, l]; taken in float64 they lose nothing at float32's precision, and cost far less
    than an SVD of B.

    Args:
        matrix: [m, n], float32 or float64, on any device. Not changed.
        rank: 0 < rank <= min(m, n).
        n_oversamples: extra columns of the sketch; a tenth of the rank where that is more.
        n_iter: power iterations.
        seed: of the sketch, which is drawn on the CPU so that every device uses the same one.

    Returns:
        U [m, rank] with orthonormal columns and V [rank, n] with orthogonal rows (the singular values are in V).
    """
    m, n = matrix.shape
    check_rank(rank, m, n)
    columns = sketched(matrix, oversampled(rank, n_oversamples, OVERSAMPLING_SHARE, m, n), seed)  # [m, l]
    return _iterated(matrix, columns, rank, n_iter)


def from_columns(matrix: Tensor, rank: int, *, n_oversamples: int = 16) -> tuple[Tensor, Tensor]:
    """The same for a matrix most of whose norm is in few columns: begun with the largest of these in the place of
    Gaussian ones, one iteration gives what `rsvd` gives after two. Nothing is drawn."""
    m, n = matrix.shape
    check_rank(rank, m, n)
    largest = matrix.square().sum(0).topk(oversampled(rank, n_oversamples, OVERSAMPLING_SHARE, m, n)).indices
    return _iterated(matrix, matrix[:, largest], rank, n_iter=1)


def _iterated(matrix: Tensor, columns: Tensor, rank: int, n_iter: int) -> tuple[Tensor, Tensor]:
    """Power iterations from columns [m, l], and the best factors within what they span."""
    for _ in range(n_iter):
        other = conditioned(matrix.T @ conditioned(columns))  # [n, l]
        columns = matrix @ other
    basis = torch.linalg.qr(columns).Q
    return truncated(basis, basis.T @ matrix, rank)


def check_rank(rank: int, m: int, n: int) -> None:
    """Raises ValueError unless a matrix of m x n has factors of this rank."""
    if not 0 < rank <= min(m, n):
        raise ValueError(f"rank must be in 1..{min(m, n)} for a matrix of {m} x {n}, got {rank}")


def oversampled(rank: int, n_oversamples: int, share: float, m: int, n: int) -> int:
    """Columns of a basis for so many of the result: extra ones, a share of the rank where that is more, while there are
    any."""
    return min(rank + max(n_oversamples, math.ceil(share * rank)), m, n)


def sketched(matrix: Tensor, width: int, seed: int) -> Tensor:
    """A matrix times Gaussian columns, which are drawn on the CPU: every device has the same. [m, n] -> [m, width]"""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    return matrix @ drawn.to(matrix.device)


def truncated(basis: Tensor, small: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors U [m, rank] and V [rank, n] within a basis: Q [m, l] orthonormal, small = Q^T A [l, n]."""
    gram = _gram64(small)
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).to(small.dtype)  # [l, rank], largest first
    return basis @ vectors, vectors.T @ small


def numerical_rank(values: Tensor, norm: float, shape: tuple[int, int]) -> int:
    """How many singular values of a difference of two matrices are more than the rounding of these in float32.

    Rounding is white noise of about a third of a unit in the last place. Its largest singular value is its standard
    deviation times (sqrt(m) + sqrt(n)) (Marchenko and Pastur), so that eps ||W||_F (1 / sqrt(m) + 1 / sqrt(n)) is twice
    what the roundings of both make.

    Args:
        values: singular values, the largest first.
        norm: ||W||_F of the matrices.
        shape: (m, n).
    """
    noise = torch.finfo(torch.float32).eps * norm * sum(size**-0.5 for size in shape)
    return int((values > noise).sum())


def conditioned(columns: Tensor) -> Tensor:
    """Other columns with the same span, far from dependent. [n, l] -> [n, l]

    Orthonormal up to rounding: by the Cholesky factor of their Gram matrix, at a fraction of what Householder's QR
    costs. Where columns are too near to dependent for that, as those of a LoRA expert beyond its rank, by QR.
    """
    gram = columns.T @ columns
    sizes = gram.diagonal().rsqrt()
    factor, failed = torch.linalg.cholesky_ex(gram * sizes * sizes[:, None], upper=True)
    if int(failed) or not float(factor.diagonal().min()) > NEAR_DEPENDENT:  # not a number, too
        basis: Tensor = torch.linalg.qr(columns).Q
        return basis
    solved: Tensor = torch.linalg.solve_triangular(factor, columns * sizes, upper=True, left=False)
    return solved


def _gram64(rows: Tensor) -> Tensor:
    """rows @ rows.T in float64, a slab of columns at a time to keep the float64 copy small. [l, n] -> [l, l]."""
    gram = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], 4096):
        wide = rows[:, start : start + 4096].double()
        gram.addmm_(wide, wide.T)
    return gram
