"""What is nearest to a residual at the same bytes: a code's rounded numbers, or fewer components as they are.

Of a fine-tune the spectrum falls slowly, and a code's larger rank is worth far more than its rounding costs. The
residual of adapters that were merged into their models ends after a few components, which are exact as numbers.

Pure functions on tensors. Knows nothing of experts, bundles or files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .code import Code
from .factors import Factors
from .weights import Weights

Stored = dict[str, Tensor]
# What follows the module's name in the keys of a residual that is stored as numbers.
NUMBERS = Factors.suffixes


def nearest(
    code: Code, dtype: torch.dtype, b: Tensor, a: Tensor, room: int, weights: Weights | None = None
) -> tuple[Code, Stored]:
    """The stored tensors that leave the least of B A unsaid, and the code that decodes them.

    Args:
        code: the bundle's. dtype: the bundle's.
        b, a: [out, r] and [r, in] in float32, of an SVD: components are orthogonal, the largest first.
        room: bytes that numbers may take; what the code needs it may have.
        weights: with them B A is the weighted residual's; what is stored is the residual's own, and what counts
            is what is left of the weighted one.
    """
    weights = weights or Weights()
    plain = weights.plain_factors(b, a)
    stored = code.encode(*plain)
    if code.peft_readable:
        return code, stored
    shape = (len(b), a.shape[1])
    least, best = _unsaid(b, a, *weights.weighted_factors(*code.decode(stored, *shape))), (code, stored)
    for width in dict.fromkeys((dtype, torch.bfloat16)):
        numbers = Factors(width)
        count = room // numbers.bytes(*shape, 1)
        if not count:
            continue
        few = numbers.encode(plain[0][:, :count], plain[1][:count])
        lost = _unsaid(b, a, *weights.weighted_factors(*numbers.decode(few, *shape)))
        if lost < least:
            least, best = lost, (numbers, few)
    return best


def _unsaid(b: Tensor, a: Tensor, near_b: Tensor, near_a: Tensor) -> float:
    """||B A - B' A'||^2 where components are orthogonal and B' A' has the first of them, rounded.

    Of one component b a - b' a' = (b - b') a + b' (a - a'), which has no difference of large numbers.
    """
    count = len(near_a)
    squares = b.square().sum(0), a.square().sum(1)
    lost = (squares[0] * squares[1])[count:].sum()
    b_off, a_off = b[:, :count] - near_b, a[:count] - near_a
    first = b_off.square().sum(0) * squares[1][:count]
    second = near_b.square().sum(0) * a_off.square().sum(1)
    both = (b_off * near_b).sum(0) * (a[:count] * a_off).sum(1)
    return float(lost + (first + second + 2 * both).sum())
