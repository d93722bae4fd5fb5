"""W = rho W̄ + B A for whole matrices: the sum, what it leaves for B A to say, and what B A leaves unsaid.

The only place where matrices are taken apart and put together; a forward pass never makes W (`polymerge.model.residual`
has its sum). Pure functions on tensors of one layout: a transposed weight has its factors' product transposed.
"""

from __future__ import annotations

from torch import Tensor


def residual_of(weight: Tensor, base: Tensor, ratio: float) -> Tensor:
    """R = W - rho W̄, in the weight's own memory. All float32."""
    return weight.sub_(base, alpha=ratio)


def unsaid(residual: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """R - B A, in the residual's own memory. R [out, in], B [out, r], A [r, in], float32."""
    return residual.addmm_(b, a, alpha=-1.0)


def dense(base: Tensor, ratio: float, factors: tuple[Tensor, Tensor] | None, *, transposed: bool = False) -> Tensor:
    """W = rho W̄ + B A, float32, in new memory.

    Args:
        base: [out, in] float32, or [in, out] where `transposed`.
        factors: B [out, r] and A [r, in], float32; None for rank 0.
    """
    weight = base * ratio
    if factors is None:
        return weight
    update = factors[0] @ factors[1]  # [out, in]
    return weight.add_(update.T if transposed else update)
