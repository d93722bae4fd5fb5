"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns of a matrix are rounded one after the other, and those that are
still to come make good what the inputs notice of it.

With the paper's settings: columns by falling second moment (act-order), damping of 1%, blocks of 128 columns. Knows
matrices, grids and second moments of inputs; does not know where these come from or how numbers are stored.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

DAMPING, BLOCK = 0.01, 128


class Levels(Protocol):
    """The values that every number of a matrix may take."""

    @property
    def T(self) -> Self:
        """Of the transposed matrix."""

    def __getitem__(self, at: int | Tensor) -> Self:
        """Of some rows."""

    def contiguous(self) -> Self:
        """With numbers of a row side by side in memory."""

    def round(self, numbers: Tensor) -> Tensor:
        """The nearest values."""


class Moments:
    """E[x x^T] of a layer's inputs, [in, in] float32, and what GPTQ makes of it whatever it rounds."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @cached_property
    def order(self) -> Tensor:
        """Inputs by falling second moment."""
        return self.matrix.diagonal().argsort(descending=True)

    @cached_property
    def factor(self) -> Tensor:
        """The upper Cholesky factor of the inverse, damped and in order."""
        work: Tensor = self.matrix[self.order][:, self.order].double()
        work.diagonal().add_(DAMPING * work.diagonal().mean().clamp(min=1e-12))
        work = torch.linalg.cholesky(work)  # one name, so that no more than two of these are in memory
        work = torch.cholesky_inverse(work)
        work = torch.linalg.cholesky(work, upper=True)
        return work.float()


def gptq(weight: Tensor, moments: Moments, levels: Levels) -> Tensor:
    """weight [out, in] float32 -> the rounded weight, every number one of its levels."""
    factor, columns = moments.factor, levels.T  # rows lie together in memory, columns do not
    columns, work = columns[moments.order].contiguous(), weight.T[moments.order].contiguous()  # [in, out]
    rounded = torch.empty_like(work)
    for first in range(0, len(work), BLOCK):
        last = min(first + BLOCK, len(work))
        errors = torch.empty_like(work[first:last])
        for column in range(first, last):
            rounded[column] = columns[column].round(work[column])
            error = (work[column] - rounded[column]) / factor[column, column]
            work[column:last].addr_(factor[column, column:last], error, alpha=-1)
            errors[column - first] = error
        work[last:] -= factor[first:last, last:].T @ errors
    return rounded[moments.order.argsort()].T
