"""The arithmetic of one tensor against float64."""

import pytest
import torch

from polymerge.merging.compress import frobenius_norm


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-8, 1.0, 1e8, 1e25])
@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (500, 3), (200, 300)])
def test_the_norm_is_float64s_to_float32_rounding(shape: tuple[int, int], scale: float) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    for given in (matrix, matrix.T):
        assert frobenius_norm(given) == pytest.approx(float(matrix.double().norm()), rel=1e-6)
    assert frobenius_norm(torch.zeros(shape)) == 0.0
