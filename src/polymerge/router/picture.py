"""The embeddings as a picture: points in the plane with their texts, as plain data for the report.

The plane is that of the training samples' two main axes (PCA), so pictures of one router can be laid over each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.base import FloatArray
from .samples import Sample

if TYPE_CHECKING:
    from .router import Router

POINTS = 600  # more make a page slow and show no more
TEXT = 160  # characters of a text on hover


def draw_samples(router: Router) -> list[dict[str, Any]]:
    """The training samples' points."""
    return draw(router, router.head.vectors, router.samples)


def draw(router: Router, vectors: FloatArray, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """{"x", "y", "field", "text"} of samples with vectors [n, d] in the head's space, evenly thinned out."""
    mean, axes = main_axes(router.head.vectors)
    kept = np.unique(np.linspace(0, len(samples) - 1, min(POINTS, len(samples))).astype(int))
    places = (vectors[kept] - mean) @ axes.T  # [points, 2]
    return [
        {"x": round(float(x), 4), "y": round(float(y), 4), "field": samples[n].field, "text": samples[n].text[:TEXT]}
        for n, (x, y) in zip(kept, places, strict=True)
    ]


def main_axes(vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean [d] and the two main axes [2, d] of vectors [n, d]; the largest entry of an axis is positive."""
    mean = vectors.mean(axis=0)
    axes = np.linalg.svd(vectors - mean, full_matrices=False)[2][:2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    return mean, axes * signs[:, None]
