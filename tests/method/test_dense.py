"""Taking a matrix apart and putting it together again."""

import pytest
import torch

from polymerge.method.dense import dense, residual_of, unsaid


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_taken_apart_is_put_together_again(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, base = (torch.randn(6, 4, generator=generator) for _ in range(2))
    residual = residual_of(weight.clone(), base, 1.25)
    torch.testing.assert_close(residual, weight - 1.25 * base)
    matrix = residual.T if transposed else residual  # [out, in]
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    factors = (u * s, v)
    torch.testing.assert_close(dense(base, 1.25, factors, transposed=transposed), weight, atol=1e-5, rtol=0)
    left = unsaid(matrix.clone(), (u * s)[:, :3], v[:3])
    torch.testing.assert_close(left.norm(), s[3], atol=1e-5, rtol=0)  # Eckart and Young
    assert torch.equal(dense(base, 1.25, None, transposed=transposed), base * 1.25)
