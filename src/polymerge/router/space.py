"""What is done to a hidden state before it is compared with others.

Hidden states share a large common part, and a few of their dimensions are far larger than the rest, so that cosines
between any two of them are near 1. The common part is taken away, every dimension is given the same spread, and the
vector the length 1. Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine.base import FloatArray


@dataclass(frozen=True)
class Space:
    """A fitted transformation: `space(raw)` of raw vectors [n, d] are vectors [n, d] of length 1.

    Attributes:
        mean, scale: [d].
    """

    mean: FloatArray
    scale: FloatArray

    def __call__(self, raw: FloatArray) -> FloatArray:
        moved = (raw - self.mean) / self.scale
        directions: FloatArray = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
        return directions


def fit_space(raw: FloatArray) -> Space:
    """Mean and spread of raw vectors [n, d]. A dimension that hardly moves is not blown up."""
    spread = raw.std(axis=0)
    least = 1e-3 * spread.max() or 1.0  # of a single sample nothing moves
    return Space(raw.mean(axis=0), np.maximum(spread, least))
