"""What is done to a hidden state before it is compared with others.

Hidden states share a large common part, and a few of their dimensions are far larger than the rest, so that cosines
between any two of them are near 1. The common part is taken away, every dimension is given the same spread, and the
vector the length 1. Then the directions in which texts of one topic differ from each other are made smaller: what they
tell is not the topic (whitening by the covariance within classes, as linear discriminant analysis has it, shrunk
towards its mean: Ledoit and Wolf 2004). Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Floats, Ints

SHRINKAGE = 0.8  # chosen on rows of new wording (docs/log-router.md)
AXES = 256  # kept at most; the others vary too little to be made smaller
ROWS = 1024  # that the axes are read off, at most: their cost grows with the cube, and what they tell does not


@dataclass(frozen=True)
class Space:
    """A fitted transformation: `space(raw)` of raw vectors [n, d] are vectors [n, d] of length 1.

    Attributes:
        mean, scale: [d].
        axes: [k, d], of length 1: where texts of one topic differ most.
        gains: [k], what is left of each axis, 0 to 1.
    """

    mean: FloatArray
    scale: FloatArray
    axes: FloatArray
    gains: FloatArray

    def __call__(self, raw: FloatArray) -> FloatArray:
        moved = _directions((raw - self.mean) / self.scale)
        along = (moved @ self.axes.T) * (self.gains - 1)
        return _directions(moved + (along @ self.axes).astype(np.float32))


def fit_space(raw: FloatArray, topics: Ints | None = None) -> Space:
    """Mean and spread of raw vectors [n, d]. A dimension that hardly moves is not blown up.

    Args:
        topics: [n], which vectors are of one topic; -1 is none. Without them no axis is made smaller.
    """
    spread = raw.std(axis=0)
    least = 1e-3 * spread.max() or 1.0  # of a single sample nothing moves
    none = np.zeros((0, raw.shape[1]), np.float32)
    plain = Space(raw.mean(axis=0), np.maximum(spread, least), none, none[:, 0])
    if topics is None:
        return plain
    axes, gains = _axes(plain(raw).astype(np.float64), topics)
    return Space(plain.mean, plain.scale, axes, gains)


def _axes(vectors: Floats, topics: Ints) -> tuple[FloatArray, FloatArray]:
    """Main axes of the covariance within topics, and what is left of each."""
    within = np.zeros_like(vectors)
    for topic in np.unique(topics[topics >= 0]):
        inside = topics == topic
        within[inside] = vectors[inside] - vectors[inside].mean(axis=0)
    if len(within) > ROWS:  # evenly, so that every topic has its share
        within = within[np.linspace(0, len(within) - 1, ROWS).astype(np.int64)]
    values, left = np.linalg.eigh(within @ within.T)
    values, left = values[::-1][:AXES], left[:, ::-1][:, :AXES]
    some = values > 1e-6 * values[0]
    variances, left = values[some] / len(within), left[:, some]
    axes = left.T @ within / np.sqrt(values[some])[:, None]
    mean = np.square(within).sum() / within.size
    gains = np.sqrt(SHRINKAGE * mean / ((1 - SHRINKAGE) * variances + SHRINKAGE * mean))
    return axes.astype(np.float32), gains.astype(np.float32)


def _directions(vectors: FloatArray) -> FloatArray:
    directions: FloatArray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return directions
