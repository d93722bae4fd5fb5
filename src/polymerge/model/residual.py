"""y = rho (W̄ x) + B (A x): the only place where a forward pass puts the base's product and a residual together.

rho is a float32 number and multiplies in float32, whatever the model computes in. Of a number's digits bfloat16 keeps
three: 1.0028 would be 1. W̄ x and B (A x) are rounded to the model's dtype as any layer's output is; rho (W̄ x) is not,
and the sum is rounded once. So a row's answer is its own: alone (`add_one`) and among others (`add_mixed`) it differs
by the rounding of B (A x), which is small where residuals are. (What 16 bits cannot hold stays lost: W̄ x alone does not
move where rho is within half a step of 1, 0.002 in bfloat16.)

Pure functions on tensors. Knows no experts or layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .product import product
from .shares import Entries


class Term(NamedTuple):
    """A weighted residual of some rows: share * B (A x).

    Attributes:
        x: [..., in], the input of the rows.
        a: [r, in]; None for a whole matrix B [out, in] that takes the place of B A.
        b: [out, r].
        share: float32, multiplies A x [..., r]; None for 1.
        rows: [n], where along the first dimension of the output these rows are; None for all.
    """

    x: Tensor
    a: Tensor | None
    b: Tensor
    share: Tensor | None = None
    rows: Tensor | None = None


def mixed_ratio(weights: Tensor, ratios: Tensor) -> Tensor:
    """rho of every row: weights [B, K] and ratios [K], both float32 -> [B, 1]. That of a row with one expert is exact.

    Not a product of matrices, which a GPU may be told to compute with fewer digits.
    """
    return (weights * ratios).sum(dim=1, keepdim=True)


def add_one(y: Tensor, x: Tensor, a: Tensor, b: Tensor, ratio: float) -> None:
    """y := rho y + B (A x), in place, with one rho and one residual for all rows.

    Args:
        y: [..., out], the base's product W̄ x; can be viewed as a matrix.
        x: [..., in]. a: [r, in]. b: [out, r]; r may be 0.
    """
    if not len(a):
        y.mul_(ratio)
        return
    z = F.linear(x, a)
    y.view(-1, y.shape[-1]).addmm_(z.view(-1, len(a)), b.T, beta=ratio)


def add_mixed(y: Tensor, ratio: Tensor | None, terms: Iterable[Term]) -> None:
    """y := rho y + the sum of the terms, in place.

    Args:
        y: [B, ..., out], the base's product W̄ x; can be viewed as a matrix.
        ratio: rho of every row, float32, broadcast over y; None where it is 1 everywhere.
        terms: taken one after the other.
    """
    if ratio is None or y.dtype.itemsize >= ratio.dtype.itemsize:
        if ratio is not None:
            y.mul_(ratio)
        for term in terms:
            _add(y, term)
        return
    update = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
    for term in terms:
        _add(update, term)
    torch.addcmul(update, y, ratio, out=y)  # in float32, and rounded once


def add_entries(y: Tensor, ratio: Tensor | None, z: Tensor, b: Tensor, entries: Entries) -> None:
    """y := rho y + the residuals of all entries, in place, in as many steps for many pairs as for few.

    Args:
        y, ratio: as `add_mixed`'s.
        z: A x of every entry, as `product` gives it; written to.
        b: [places, r, out].
    """
    if entries.parts is not None:
        z.view(len(entries.parts), -1, z.shape[-1]).mul_(entries.parts.view(-1, 1, 1))
    update = product(z, b, entries).view(len(entries.rows), *y.shape[1:])
    if entries.back is not None:
        update = update.index_select(0, entries.back)
    else:
        update = torch.zeros(y.shape, dtype=y.dtype, device=y.device).index_add_(0, entries.rows, update)
    if ratio is None:
        y.add_(update)
    else:
        torch.addcmul(update, y, ratio, out=y)  # in float32, and rounded once


def _add(y: Tensor, term: Term) -> None:
    z = term.x if term.a is None else F.linear(term.x, term.a)
    if term.share is not None:
        z = (z * term.share).to(z.dtype) if term.a is None else z.mul_(term.share)
    if term.rows is None:
        y.view(-1, y.shape[-1]).addmm_(z.reshape(-1, z.shape[-1]), term.b.T)
    else:
        y.index_add_(0, term.rows, F.linear(z, term.b))
