"""Labelled vectors, and splits of them into what a fit sees and what is kept away from it to measure on.

Two kinds of keeping away: at random, as validation samples are; and by wording, where whole clusters of like texts are
kept away, since users write otherwise than samples do. Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Bools, Ints
from .space import Space, fit_space

FOLDS = 5
WORDINGS = 3  # clusters of a field


class Labelled(NamedTuple):
    """Raw vectors [n, d] and the numbers of their fields [n]."""

    vectors: FloatArray
    labels: Ints

    def take(self, numbers: Ints | Bools) -> Labelled:
        return Labelled(self.vectors[numbers], self.labels[numbers])


def space_of(train: Labelled, background: Labelled) -> Space:
    """The space of samples and background together, in which what tells texts of one field or topic apart is small."""
    topics = np.where(background.labels >= 0, background.labels + train.labels.max() + 1, -1)
    return fit_space(np.concatenate([train.vectors, background.vectors]), np.concatenate([train.labels, topics]))


def at_random(
    train: Labelled, held: Labelled | None, seed: int, first: int | None = None
) -> Iterator[tuple[Labelled, Labelled]]:
    """(to fit on, to measure on): the validation samples, or folds that hold every field on both sides.

    Args:
        first: without validation samples, so many of the first are measured and no others.
    """
    if held is not None:
        yield train, held
        return
    from sklearn.model_selection import StratifiedKFold

    count = min(FOLDS, int(np.bincount(train.labels).min()))
    folds = StratifiedKFold(count, shuffle=True, random_state=seed)
    for fitting, measuring in folds.split(train.vectors, train.labels):
        measured = measuring if first is None else measuring[measuring < first]
        if len(measured):
            yield train.take(fitting), train.take(measured)


def by_wording(train: Labelled, held: Labelled | None, seed: int) -> Iterator[tuple[Labelled, Labelled]]:
    """(to fit on, to measure on): in turn, one cluster of every field is kept away; validation samples that belong to
    it are measured too. There are at least two turns, and every field has a sample to fit on in each."""
    space = fit_space(train.vectors)
    near, far = space(train.vectors), space(held.vectors) if held is not None else None
    folds = np.zeros(len(train.labels), dtype=np.int64)
    others = np.zeros(len(held.labels) if held is not None else 0, dtype=np.int64)
    for field in np.unique(train.labels):
        inside = train.labels == field
        folds[inside], centres = _clusters(near[inside], seed)
        if held is not None and far is not None and (held.labels == field).any():
            belongs = held.labels == field
            others[belongs] = (far[belongs] @ centres.T).argmax(axis=1)
    for fold in range(int(folds.max()) + 1):
        measured = train.take(folds == fold)
        if held is not None:
            more = held.take(others == fold)
            measured = Labelled(
                np.concatenate([measured.vectors, more.vectors]), np.concatenate([measured.labels, more.labels])
            )
        yield train.take(folds != fold), measured


def _clusters(vectors: FloatArray, seed: int) -> tuple[Ints, FloatArray]:
    """Each vector's cluster, and the clusters' directions. k-means; where all vectors are alike, halves by order."""
    from sklearn.cluster import KMeans

    count = min(WORDINGS, len(vectors), len(np.unique(vectors, axis=0)))
    if count < 2:
        return np.arange(len(vectors)) % 2, vectors[:2]
    fitted = KMeans(count, n_init=3, random_state=seed).fit(vectors)
    centres = fitted.cluster_centers_
    return fitted.labels_.astype(np.int64), centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
