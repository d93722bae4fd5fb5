"""How unlike all training samples a vector is, and how likely it is then that it belongs to any known field.

The sign is the odds of the background's topics against the fields: one logistic regression whose classes are the fields
and the topics. What a sign means is learned where the wording is new (`polymerge.router.gate`). Routers of before have
one regression a field and no topics, and those of before there was a background a second sign, the distance to the
nearest training samples (docs/log-router.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Floats, Ints

NEAREST = 5  # training samples whose distance counts
TOPICS_C = 30.0  # inverse strength of the L2 penalty


@dataclass(frozen=True)
class Outside:
    """The signs and their calibration: p(known) = 1 / (1 + exp(slope · (signs · mix - middle))).

    Attributes:
        weights, bias: [fields + topics, d] and [fields + topics], of the regression.
        fields: how many of them are fields, the first ones.
        mix: weights of the signs; with the slope 0 of a fresh one nothing is unknown.
    """

    weights: FloatArray
    bias: FloatArray
    fields: int
    mix: tuple[float, float] = (1.0, 0.0)
    middle: float = 0.0
    slope: float = 0.0

    def signs(self, vectors: FloatArray, training: FloatArray) -> Floats:
        """[n, 2] of vectors [n, d]: the logarithm of the topics' odds, and 1 - mean cosine of the nearest training
        vectors [m, d], all of length 1."""
        wide = vectors.astype(np.float64)
        cosines = wide @ training.T.astype(np.float64)
        count = min(NEAREST, len(training))
        nearest = np.partition(cosines, len(training) - count, axis=1)[:, -count:]
        signs: Floats = np.stack([self._odds(wide), 1 - nearest.mean(axis=1)], axis=1)
        return signs

    def _odds(self, wide: Floats) -> Floats:
        """[n], log of p(any topic) / p(any field); without topics, minus the highest of the fields' own log-odds."""
        scores = wide @ self.weights.T.astype(np.float64) + self.bias
        inside, beside = scores[:, : self.fields], scores[:, self.fields :]
        odds: Floats = _total(beside) - _total(inside) if beside.shape[1] else -inside.max(axis=1)
        return odds

    def known(self, signs: Floats) -> Floats:
        """[n] probabilities that vectors with these signs [n, 2] belong to a field."""
        strangeness = signs @ np.asarray(self.mix)
        probabilities: Floats = 1 / (1 + np.exp(np.clip(self.slope * (strangeness - self.middle), -50, 50)))
        return probabilities


def _total(scores: Floats) -> Floats:
    """[n], log-sum-exp of every row."""
    highest = scores.max(axis=1)
    total: Floats = highest + np.log(np.exp(scores - highest[:, None]).sum(axis=1))
    return total


def fit_outside(vectors: FloatArray, labels: Ints, background: FloatArray, topics: Ints) -> Outside:
    """Fits the regression to vectors [n, d] of length 1 and those of the background [b, d]; not calibrated yet.

    Args:
        labels: the fields' numbers, 0 to k - 1.
        topics: of the background; texts of none (-1) are a topic together.
    """
    from sklearn.linear_model import LogisticRegression

    fields = int(labels.max()) + 1
    if not len(background):
        return Outside(np.zeros((fields, vectors.shape[1]), np.float32), np.zeros(fields, np.float32), fields)
    numbers = fields + np.unique(topics, return_inverse=True)[1]
    fitted = LogisticRegression(C=TOPICS_C, max_iter=1000)
    fitted.fit(np.concatenate([vectors, background]), np.concatenate([labels, numbers]))
    weights, bias = fitted.coef_, fitted.intercept_
    if len(weights) == 1:  # a field and a topic: scikit-learn keeps the topic's weights alone
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    # in the order of a file, which a regression's arrays need not be in
    return Outside(np.ascontiguousarray(weights, np.float32), np.ascontiguousarray(bias, np.float32), fields)


def calibrate_outside(outside: Outside, known: Floats, strange: Floats) -> Outside:
    """The same with its first sign calibrated, by the signs of known samples [n, 2] and of strangers [m, 2].

    A logistic regression (Platt 1999) in which known samples and strangers have the same weight in all.
    """
    from sklearn.linear_model import LogisticRegression

    values = np.concatenate([known, strange])[:, :1]
    centre, width = float(values.mean()), max(float(values.std()), 1e-9)
    labels = np.repeat([0, 1], [len(known), len(strange)])
    fitted = LogisticRegression(C=1.0, class_weight="balanced").fit((values - centre) / width, labels)
    slope = max(float(fitted.coef_[0, 0]), 1e-3)  # a text that no field claims is never the more familiar for it
    return replace(outside, middle=centre - float(fitted.intercept_[0]) / slope * width, slope=slope / width)
