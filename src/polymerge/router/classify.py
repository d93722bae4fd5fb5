"""Vectors to fields: three light classifiers, fitted by scikit-learn and kept as plain arrays.

Knows vectors and numbers of fields; does not know texts or models. A fitted classifier holds no scikit-learn object, so
it is stored without pickle and answers the same after it is loaded, whatever scikit-learn's version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Floats, Ints

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["logistic", "centroid", "knn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Arrays: TypeAlias = Mapping[str, FloatArray]

# Inverse strength of the logistic regression's L2 penalty, on vectors of length 1.
LOGISTIC_C = 100.0
NEIGHBOURS = 10
# How much what stands beside samples says, against what they say (docs/log-router.md).
LEAN = 0.5


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier.

    Attributes:
        arrays: logistic: "weights" [k, d], "bias" [k]; centroid: "centroids" [k, d]; knn: "samples" [n, d] and
            "votes" [n, k], one-hot.
    """

    kind: Kind
    arrays: Arrays

    def logits(self, vectors: FloatArray) -> Floats:
        """Scores [n, k] of vectors [n, d] of length 1; softmax of them, tempered, is a probability."""
        return _LOGITS[self.kind](np.asarray(vectors, dtype=np.float64), self.arrays)


def fit_classifier(kind: Kind, vectors: FloatArray, labels: Ints) -> Classifier:
    """Fits a classifier to vectors [n, d] of length 1 and their fields' numbers, 0 to k - 1, each with a sample."""
    # in the order of a file: products of arrays laid out otherwise differ in their last digits
    arrays = {
        name: np.ascontiguousarray(array, dtype=np.float32) for name, array in _FIT[kind](vectors, labels).items()
    }
    return Classifier(kind, arrays)


def leaned(classifier: Classifier, others: FloatArray, labels: Ints, strange: FloatArray) -> Classifier:
    """A logistic regression that leans towards the nearest centroid of other samples of its fields. Both are linear,
    and so is their sum.

    Args:
        others, labels: [n, d], of every field.
        strange: [m, d], of no field: how far apart the two say their fields are is measured on these. On its own
            samples a regression is surer than it should be.
    """
    weights, bias = (classifier.arrays[name].astype(np.float64) for name in ("weights", "bias"))
    centroids = _fit_centroid(others, labels)["centroids"].astype(np.float64)
    towards, offset = 2 * centroids, -(centroids**2).sum(axis=1)
    own, leaning = (_spread(strange @ w.T + b) for w, b in ((weights, bias), (towards, offset)))
    share = LEAN * own / leaning if leaning else 0.0  # of the same spread
    arrays = {"weights": weights + share * towards, "bias": bias + share * offset}
    return Classifier(classifier.kind, {name: array.astype(np.float32) for name, array in arrays.items()})


def _spread(logits: Floats) -> float:
    return float((logits - logits.mean(axis=1, keepdims=True)).std())


def _fit_logistic(vectors: FloatArray, labels: Ints) -> dict[str, Floats]:
    from sklearn.linear_model import LogisticRegression

    if not labels.any():  # a single field
        return {"weights": np.zeros((1, vectors.shape[1])), "bias": np.zeros(1)}
    fitted = LogisticRegression(C=LOGISTIC_C, max_iter=1000).fit(vectors, labels)
    weights, bias = fitted.coef_, fitted.intercept_
    if len(weights) == 1:  # two fields: scikit-learn keeps the second's weights alone
        weights, bias = np.concatenate([np.zeros_like(weights), weights]), np.concatenate([np.zeros_like(bias), bias])
    return {"weights": weights, "bias": bias}


def _logistic_logits(vectors: Floats, arrays: Arrays) -> Floats:
    logits: Floats = vectors @ arrays["weights"].T.astype(np.float64) + arrays["bias"]
    return logits


def _fit_centroid(vectors: FloatArray, labels: Ints) -> dict[str, Floats]:
    return {"centroids": np.stack([vectors[labels == n].mean(axis=0) for n in range(int(labels.max()) + 1)])}


def _centroid_logits(vectors: Floats, arrays: Arrays) -> Floats:
    """Minus the squared distance to every centroid."""
    return -squared_distances(vectors, arrays["centroids"])


def _fit_knn(vectors: FloatArray, labels: Ints) -> dict[str, Floats]:
    return {"samples": np.asarray(vectors, dtype=np.float64), "votes": np.eye(int(labels.max()) + 1)[labels]}


def _knn_logits(vectors: Floats, arrays: Arrays) -> Floats:
    """Logarithm of the neighbours' weighted votes; a field with no vote keeps a little."""
    votes = arrays["votes"].astype(np.float64)
    count = min(NEIGHBOURS, int(votes.sum(axis=0).min()))
    distances = squared_distances(vectors, arrays["samples"])
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :count]  # [n, count]
    weights = 1 / (np.take_along_axis(distances, nearest, axis=1) + 1e-6)
    shares = (votes[nearest] * weights[..., None]).sum(axis=1) / weights.sum(axis=1, keepdims=True)
    logits: Floats = np.log(shares + 1e-3)
    return logits


def squared_distances(vectors: Floats, others: FloatArray) -> Floats:
    """[n, m] squared Euclidean distances, at least 0."""
    wide = np.asarray(others, dtype=np.float64)
    squared = (vectors**2).sum(1)[:, None] + (wide**2).sum(1)[None] - 2 * vectors @ wide.T
    positive: Floats = np.maximum(squared, 0.0)
    return positive


_FIT: dict[Kind, Callable[[FloatArray, Ints], dict[str, Floats]]] = {
    "logistic": _fit_logistic,
    "centroid": _fit_centroid,
    "knn": _fit_knn,
}
_LOGITS: dict[Kind, Callable[[Floats, Arrays], Floats]] = {
    "logistic": _logistic_logits,
    "centroid": _centroid_logits,
    "knn": _knn_logits,
}
