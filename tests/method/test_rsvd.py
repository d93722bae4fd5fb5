import pytest
import torch

from polymerge.method.rsvd import factors_are_smaller, from_columns, rank_for_rate, rsvd, sketch_seed


def spectrum(kind: str, count: int) -> torch.Tensor:
    index = torch.arange(1, count + 1, dtype=torch.float32)
    return {"flat": index**-0.05, "slow": index**-0.4, "fast": index**-1.5, "cliff": (index < 30).float() + 1e-3}[kind]


def matrix_with(values: torch.Tensor, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, len(values), generator=generator)).Q
    return (u * values) @ v.T


@pytest.mark.parametrize("kind", ["flat", "slow", "fast", "cliff"])
@pytest.mark.parametrize("shape", [(200, 500), (500, 200), (300, 300)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_error_is_within_two_percent_of_the_optimum(kind: str, shape: tuple[int, int], rank: int) -> None:
    matrix = matrix_with(spectrum(kind, min(shape)), *shape, seed=rank)
    optimum = torch.linalg.svdvals(matrix.double())[rank:].norm()
    u, v = rsvd(matrix, rank, seed=3)
    error = (matrix.double() - u.double() @ v.double()).norm()
    assert error <= 1.02 * optimum + 1e-6 * matrix.norm()


@pytest.mark.parametrize("shape", [(200, 500), (500, 200), (300, 300)])
@pytest.mark.parametrize("rank", [7, 40])
def test_begun_with_the_largest_columns_one_iteration_is_as_near_as_two(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(shape, generator=generator) * torch.randn(shape[1], generator=generator).mul(1.5).exp()
    optimum = torch.linalg.svdvals(matrix.double())[rank:].norm()
    ours, theirs = ((matrix - u @ v).norm() for u, v in (from_columns(matrix, rank), rsvd(matrix, rank)))
    assert ours <= 1.002 * theirs and ours <= 1.02 * optimum
    for wrong in (0, 501):
        with pytest.raises(ValueError, match="rank must be"):
            from_columns(matrix, wrong)


def test_factors_have_the_documented_form() -> None:
    matrix = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
    u, v = rsvd(matrix, 12)
    assert u.shape == (60, 12) and v.shape == (12, 90)
    torch.testing.assert_close(u.T @ u, torch.eye(12), atol=1e-5, rtol=0)
    gram = v @ v.T
    torch.testing.assert_close(gram - torch.diag(gram.diagonal()), torch.zeros(12, 12), atol=1e-3, rtol=0)
    assert torch.all(gram.diagonal().diff() <= 1e-3)  # largest singular value first


def test_full_rank_gives_the_matrix_back() -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    u, v = rsvd(matrix, 20)
    torch.testing.assert_close(u @ v, matrix, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e15])
def test_a_rank_beyond_the_matrix_s_own_loses_nothing(size: float) -> None:
    matrix = matrix_with(torch.tensor([3.0, 2.0, 1.0, 0.1, 0.01]), 120, 200, seed=1) * size
    u, v = rsvd(matrix, 40)
    torch.testing.assert_close(u.T @ u, torch.eye(40), atol=1e-5, rtol=0)
    torch.testing.assert_close(u @ v / size, matrix / size, atol=1e-5, rtol=0)


def test_same_seed_same_bits_other_seed_other_sketch() -> None:
    matrix = torch.randn(80, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rsvd(matrix, 5, seed=1)[1], rsvd(matrix, 5, seed=1)[1])
    assert not torch.equal(rsvd(matrix, 5, seed=1)[1], rsvd(matrix, 5, seed=2)[1])


def test_input_is_not_changed() -> None:
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    before = matrix.clone()
    rsvd(matrix, 4)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("rank", [0, 21, -1])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.20"):
        rsvd(torch.zeros(20, 30), rank)


def test_rank_of_the_published_setting() -> None:
    # floor(0.05 * 4096 * 14336 / 18432) and floor(0.05 * 4096 * 4096 / 8192)
    assert rank_for_rate(4096, 14336, 0.95) == 159
    assert rank_for_rate(4096, 4096, 0.95) == 102
    assert rank_for_rate(4096, 4096, 1.0) == 0


@pytest.mark.parametrize("shape", [(64, 64), (576, 1536), (7, 1000)])
def test_rate_zero_is_always_kept_whole(shape: tuple[int, int]) -> None:
    assert not factors_are_smaller(*shape, rank_for_rate(*shape, 0.0))
    assert factors_are_smaller(*shape, rank_for_rate(*shape, 0.95))


def test_seeds_tell_names_apart() -> None:
    seeds = {sketch_seed(s, t, e) for s in (0, 1) for t in ("a", "ab") for e in ("b", "bc", "c")}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
