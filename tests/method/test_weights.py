"""What counts of a residual: the weights are powers of second moments, and factors go there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polymerge.method.code import Code
from polymerge.method.codes import code_of
from polymerge.method.nearest import nearest
from polymerge.method.rsvd import rsvd
from polymerge.method.weights import DAMPING, INPUTS, OUTPUTS, Side, Weights, joined


def rows(count: int, size: int, seed: int = 0) -> Tensor:
    """Rows whose directions are unlike in size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator) * torch.logspace(0, -2, size)


def power(of_rows: Tensor, exponent: float) -> Tensor:
    """The damped second moment's power, of mean one, by torch."""
    moment = of_rows.double().T @ of_rows.double()
    moment = moment / moment.diagonal().mean() + DAMPING * torch.eye(len(moment), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values**exponent) @ vectors.T


@pytest.mark.parametrize("count", [3, 12, 40])
@pytest.mark.parametrize("exponent", [INPUTS, -OUTPUTS, 0.5])
def test_a_side_is_a_power_of_its_second_moment(count: int, exponent: float) -> None:
    given, matrix = rows(count, 24), rows(5, 24, seed=1)
    weighted = Side(given).weighted(matrix, exponent)
    torch.testing.assert_close(weighted.double(), matrix.double() @ power(given, exponent), rtol=1e-4, atol=1e-5)


def test_how_large_rows_are_does_not_matter() -> None:
    given, matrix = rows(12, 24), rows(5, 24, seed=1)
    torch.testing.assert_close(Side(given * 1e-6).weighted(matrix, 0.3), Side(given).weighted(matrix, 0.3))


def test_rows_that_are_all_zero_weigh_nothing_more_than_another() -> None:
    matrix = rows(5, 24)
    weighted = Side(torch.zeros(7, 24)).weighted(matrix, 0.5)
    torch.testing.assert_close(weighted, matrix * DAMPING**0.5)


def test_factors_go_there_and_back() -> None:
    weights = Weights(Side(rows(40, 24)), Side(rows(8, 16, seed=2)))
    b, a = torch.randn(16, 3), torch.randn(3, 24)
    there = weights.weighted_factors(b, a)
    torch.testing.assert_close(there[0] @ there[1], weights.weighted(b @ a), rtol=1e-4, atol=1e-5)
    for one, other in zip(weights.plain_factors(*there), (b, a), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["factors", "int4"])
def test_weighted_factors_leave_less_of_what_counts(name: str) -> None:
    """tr(G E C E^T), the mean of (g^T E x)^2 over x and g that are apart, and more of all else."""
    given, heeded = rows(200, 48), rows(200, 64, seed=2)
    residual, rank = torch.randn(64, 48), 12
    code: Code = code_of(name, torch.float32)

    def unsaid(weights: Weights) -> Tensor:
        b, a = rsvd(weights.weighted(residual), rank)
        chosen, stored = nearest(code, torch.float32, b, a, code.bytes(64, 48, rank), weights)
        b, a = chosen.decode(stored, 64, 48)
        return residual - b @ a

    def counted(error: Tensor) -> float:
        return float((heeded @ error @ given.T).square().mean())

    plain, weighted = unsaid(Weights()), unsaid(Weights(Side(given), Side(heeded)))
    inputs_alone = unsaid(Weights(Side(given)))
    assert counted(weighted) < 0.5 * counted(plain)
    assert counted(inputs_alone) < 0.8 * counted(plain)
    assert float(weighted.norm()) > float(plain.norm())


def test_what_two_share_counts_for_both_alike() -> None:
    one, other = rows(30, 24), rows(10, 24, seed=1).flip(1) * 1e3
    both = joined([Weights(Side(one)), Weights(Side(other), Side(rows(4, 16)))])
    moments = [part.double().T @ part.double() / part.double().square().sum() for part in (one, other)]
    matrix = rows(5, 24, seed=3)
    assert both.inputs is not None and both.outputs is not None
    torch.testing.assert_close(
        both.inputs.weighted(matrix, 0.5).double(),
        matrix.double() @ power(torch.linalg.cholesky(sum(moments) + 1e-12 * torch.eye(24)).T, 0.5),
        rtol=1e-3,
        atol=1e-4,
    )
    assert joined([Weights(), Weights()]) == Weights()
