"""What is nearer at the same bytes is stored: a code's rounded numbers, or fewer components as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polymerge.method.codes import code_of
from polymerge.method.nearest import NUMBERS, nearest

OUT, IN, RATE = 96, 160, 0.5


def svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank, None] * vh[:rank]


def residual(decay: float, rank: int = min(OUT, IN)) -> Tensor:
    """Random, with singular values that fall by `decay` a component and end after `rank`."""
    generator = torch.Generator().manual_seed(3)
    u, _, vh = torch.linalg.svd(torch.randn(OUT, IN, generator=generator), full_matrices=False)
    sizes = decay ** torch.arange(min(OUT, IN)) * (torch.arange(min(OUT, IN)) < rank)
    return (u * sizes) @ vh


def lost(matrix: Tensor, name: str, dtype: torch.dtype) -> tuple[str, float, float]:
    """The chosen code's name, its relative error, and the bundle's code's own, by torch's own product."""
    code = code_of(name, dtype)
    rank = code.rank(OUT, IN, RATE)
    b, a = svd(matrix, rank)
    chosen, stored = nearest(code, dtype, b, a, code.bytes(OUT, IN, rank))
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= code.bytes(OUT, IN, rank)
    near, own = (
        torch.linalg.norm(matrix - torch.matmul(*its.decode(parts, OUT, IN))) / torch.linalg.norm(matrix)
        for its, parts in ((chosen, stored), (code, code.encode(b, a)))
    )
    return chosen.name, float(near), float(own)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_slow_spectrum_has_the_code(name: str) -> None:
    assert lost(residual(0.98), name, torch.bfloat16)[0] == name


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_a_residual_that_ends_is_its_numbers(name: str, dtype: torch.dtype, exact: float) -> None:
    chosen, error, coded = lost(residual(0.9, rank=8), name, dtype)
    assert chosen == "factors"
    assert error < exact < coded


def test_numbers_of_half_the_bytes_where_those_of_a_float32_bundle_are_too_few() -> None:
    """The rate pays for 30 components of 16 bits, so for 15 of 32."""
    chosen, error, coded = lost(residual(0.9, rank=24), "int4", torch.float32)
    assert chosen == "factors"
    assert error < 4e-3 < coded


@pytest.mark.parametrize("decay", [0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99])
def test_what_is_chosen_is_never_farther_than_the_code(decay: float) -> None:
    _, error, coded = lost(residual(decay), "int4", torch.bfloat16)
    assert error <= coded * (1 + 1e-3)


def test_published_factors_are_what_they_are() -> None:
    code = code_of("factors", torch.float32)
    b, a = svd(residual(0.5), 10)
    chosen, stored = nearest(code, torch.float32, b, a, code.bytes(OUT, IN, 10))
    assert chosen is code
    assert set(stored) == set(NUMBERS)
    assert torch.equal(stored["lora_A.weight"], a)
