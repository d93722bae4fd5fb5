"""The factorisation for large ranks: as near as the randomized SVD that it stands in for, in the same form."""

from __future__ import annotations

import pytest
import torch

from polymerge.method.krylov import krylov
from polymerge.method.rsvd import rsvd
from tests.method.test_rsvd import matrix_with, spectrum


@pytest.mark.parametrize("kind", ["flat", "slow", "fast", "cliff"])
@pytest.mark.parametrize("shape", [(200, 500), (500, 200), (300, 300)])
@pytest.mark.parametrize("rank", [1, 7, 40, 120])
def test_error_is_within_two_percent_of_the_optimum(kind: str, shape: tuple[int, int], rank: int) -> None:
    matrix = matrix_with(spectrum(kind, min(shape)), *shape, seed=rank)
    optimum = torch.linalg.svdvals(matrix.double())[rank:].norm()
    u, v = krylov(matrix, rank, seed=3)
    error = (matrix.double() - u.double() @ v.double()).norm()
    assert error <= 1.02 * optimum + 1e-5 * matrix.norm()
    torch.testing.assert_close(u.T @ u, torch.eye(rank), atol=1e-5, rtol=0)


def test_factors_have_the_documented_form() -> None:
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    u, v = krylov(matrix, 40)
    assert u.shape == (200, 40) and v.shape == (40, 300)
    gram = v @ v.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-2, rtol=0)
    assert torch.all(gram.diagonal().diff() <= 1e-3)  # largest singular value first


@pytest.mark.parametrize("shape", [(400, 150), (150, 400)])
def test_components_far_smaller_than_the_first_are_orthogonal_too(shape: tuple[int, int]) -> None:
    """A tall matrix is turned, and its U is what the turned one's V is divided by its lengths."""
    matrix = matrix_with(10.0 ** -torch.linspace(0, 5, 150), *shape, seed=1)
    u, v = krylov(matrix, 60)
    torch.testing.assert_close(u.T @ u, torch.eye(60), atol=1e-5, rtol=0)
    exact = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(v.norm(dim=1).double(), exact[:60], atol=1e-6, rtol=1e-3)


def test_a_matrix_of_one_row_is_itself() -> None:
    """Most sums of its rows are nothing, so that the basis cannot be begun with them."""
    matrix = torch.zeros(90, 70)
    matrix[88] = torch.randn(70, generator=torch.Generator().manual_seed(0))
    for given in (matrix, matrix.T):
        u, v = krylov(given, 5)
        torch.testing.assert_close(u @ v, given, atol=1e-5, rtol=0)


def test_full_rank_gives_the_matrix_back() -> None:
    matrix = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    u, v = krylov(matrix, 40)
    torch.testing.assert_close(u @ v, matrix, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e15])
def test_a_rank_beyond_the_matrix_s_own_loses_nothing(size: float) -> None:
    matrix = matrix_with(torch.tensor([3.0, 2.0, 1.0, 0.1, 0.01]), 120, 200, seed=1) * size
    u, v = krylov(matrix, 40)
    torch.testing.assert_close(u.T @ u, torch.eye(40), atol=1e-5, rtol=0)
    torch.testing.assert_close(u @ v / size, matrix / size, atol=1e-5, rtol=0)


def test_a_matrix_of_zeros_has_factors_of_zeros() -> None:
    u, v = krylov(torch.zeros(60, 50), 10)
    assert torch.count_nonzero(u @ v) == 0 and bool(u.isfinite().all())


def test_without_iterations_it_is_the_randomized_svd_without() -> None:
    matrix = torch.randn(80, 50, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(krylov(matrix, 5, n_iter=0, seed=1), rsvd(matrix, 5, n_iter=0, seed=1), strict=True):
        assert torch.equal(ours, theirs)


def test_same_seed_same_bits_other_seed_other_sketch() -> None:
    matrix = torch.randn(80, 50, generator=torch.Generator().manual_seed(0))
    before = matrix.clone()
    assert torch.equal(krylov(matrix, 5, seed=1)[1], krylov(matrix, 5, seed=1)[1])
    assert not torch.equal(krylov(matrix, 5, seed=1)[1], krylov(matrix, 5, seed=2)[1])
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("rank", [0, 21, -1])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.20"):
        krylov(torch.zeros(20, 30), rank)
