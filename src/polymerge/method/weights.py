"""Which directions of a residual count: those of what its layer is given, and those that what follows heeds.

What a layer's error E does to an answer is, to second order, the mean over tokens of (gᵀ E x)², with x what the layer
is given and g the gradient of the answer's log-probability at what it gives: with x and g apart, tr(G E C Eᵀ), where
C = E[x xᵀ] and G = E[g gᵀ] (as K-FAC has it; Martens and Grosse 2015, arXiv 1503.05671). The truncated SVD of G^½ R C^½
leaves least of that, as SVD-LLM's does for C alone (Wang et al. 2024, arXiv 2403.07378). Smaller
exponents are taken: the whole ones make small directions of the factors large, which few bits round away.

Pure functions on tensors. Knows nothing of texts, experts or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Added to every eigenvalue of a second moment, as a share of their mean: no direction counts for nothing.
DAMPING = 0.1
# Powers of the second moments at a residual's two sides; 0.5 would be the whole weight (docs/log.md).
INPUTS, OUTPUTS = 0.35, 0.25


@dataclass(frozen=True)
class Side:
    """What counts at one side of a matrix.

    Attributes:
        rows: [k, n], of k tokens what the layer is given, or gradients of what it gives; or [n], the mean squares alone
            where directions are the axes themselves, as tokens of a vocabulary are.
    """

    rows: Tensor

    @cached_property
    def _spread(self) -> tuple[Tensor, Tensor]:
        """The second moment's eigenvalues but zeros, divided by the mean of all, and its eigenvectors [r, n]."""
        rows = self.rows.double()
        count, size = rows.shape
        rows = rows * (size**0.5 / torch.linalg.matrix_norm(rows).clamp_min(1e-300))
        values, vectors = torch.linalg.eigh(rows @ rows.T if count < size else rows.T @ rows)
        there = values > torch.finfo(torch.float32).eps * values[-1]
        values, vectors = values[there], vectors[:, there].T
        if count < size:
            vectors = vectors @ rows / values.sqrt()[:, None]
        return values.float(), vectors.float()

    def weighted(self, matrix: Tensor, power: float) -> Tensor:
        """matrix times the damped second moment to a power: [m, n] -> [m, n]."""
        if self.rows.dim() == 1:
            squares = self.rows.to(matrix.device, torch.float32)
            return matrix * (squares / squares.mean().clamp_min(1e-30) + DAMPING) ** power
        values, vectors = (part.to(matrix.device) for part in self._spread)
        least = DAMPING**power
        along = (matrix @ vectors.T) * ((values + DAMPING) ** power - least)
        return torch.addmm(matrix * least, along, vectors)


@dataclass(frozen=True)
class Weights:
    """What counts of a residual [out, in]; None is a side of which all directions count alike."""

    inputs: Side | None = None
    outputs: Side | None = None

    def weighted(self, residual: Tensor) -> Tensor:
        """What is factorised in the residual's place. [out, in] -> [out, in]"""
        if self.inputs:
            residual = self.inputs.weighted(residual, INPUTS)
        return self.outputs.weighted(residual.T, OUTPUTS).T if self.outputs else residual

    def weighted_factors(self, b: Tensor, a: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
        """B [out, r] and A [r, in] of a residual -> those of what `weighted` makes of it."""
        b = self.outputs.weighted(b.T, sign * OUTPUTS).T if self.outputs else b
        return b, self.inputs.weighted(a, sign * INPUTS) if self.inputs else a

    def plain_factors(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The way back."""
        return self.weighted_factors(b, a, -1)


def joined(several: Sequence[Weights]) -> Weights:
    """Of a residual that several experts, or two uses of a layer, share: what counts for each, alike."""
    return Weights(_joined([one.inputs for one in several]), _joined([one.outputs for one in several]))


def _joined(sides: Sequence[Side | None]) -> Side | None:
    parts = [side.rows.float() for side in sides if side]
    if not parts:
        return None
    if parts[0].dim() == 1:
        return Side(sum((part / part.sum().clamp_min(1e-30) for part in parts), torch.zeros_like(parts[0])))
    return Side(torch.cat([part / torch.linalg.matrix_norm(part).clamp_min(1e-30) for part in parts]))
