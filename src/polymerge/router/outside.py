"""How unlike all training samples a vector is, and how likely it is then that it belongs to any known field.

The sign is that no field claims the vector: one logistic regression a field, against all other fields and the texts of
the background. What a sign means is learned where the wording is new (`polymerge.router.gate`). Routers of before there
was a background have a second sign, the distance to the nearest training samples; beside a background it is no help
(docs/log-router.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Floats, Ints

NEAREST = 5  # training samples whose distance counts
CLAIM_C = 10.0  # inverse strength of the L2 penalty of a claim


@dataclass(frozen=True)
class Outside:
    """The signs and their calibration: p(known) = 1 / (1 + exp(slope · (signs · mix - middle))).

    Attributes:
        weights, bias: [k, d] and [k], of the regressions.
        mix: weights of the signs; with the slope 0 of a fresh one nothing is unknown.
    """

    weights: FloatArray
    bias: FloatArray
    mix: tuple[float, float] = (1.0, 0.0)
    middle: float = 0.0
    slope: float = 0.0

    def signs(self, vectors: FloatArray, training: FloatArray) -> Floats:
        """[n, 2] of vectors [n, d]: minus the highest claim, and 1 - mean cosine of the nearest training vectors
        [m, d], all of length 1."""
        wide = vectors.astype(np.float64)
        claims = wide @ self.weights.T.astype(np.float64) + self.bias
        cosines = wide @ training.T.astype(np.float64)
        count = min(NEAREST, len(training))
        nearest = np.partition(cosines, len(training) - count, axis=1)[:, -count:]
        signs: Floats = np.stack([-claims.max(axis=1), 1 - nearest.mean(axis=1)], axis=1)
        return signs

    def known(self, signs: Floats) -> Floats:
        """[n] probabilities that vectors with these signs [n, 2] belong to a field."""
        strangeness = signs @ np.asarray(self.mix)
        probabilities: Floats = 1 / (1 + np.exp(np.clip(self.slope * (strangeness - self.middle), -50, 50)))
        return probabilities


def fit_outside(vectors: FloatArray, labels: Ints, background: FloatArray) -> Outside:
    """Fits the regressions to vectors [n, d] of length 1 and those of the background [b, d]; not calibrated yet."""
    from sklearn.linear_model import LogisticRegression

    everything = np.concatenate([vectors, background])
    fields = np.unique(labels)
    weights, bias = np.zeros((len(fields), vectors.shape[1]), np.float32), np.zeros(len(fields), np.float32)
    for row, field in enumerate(fields):
        own = np.concatenate([labels == field, np.zeros(len(background), dtype=bool)])
        if not own.all():
            fitted = LogisticRegression(C=CLAIM_C, max_iter=1000, class_weight="balanced").fit(everything, own)
            weights[row], bias[row] = fitted.coef_[0], fitted.intercept_[0]
    return Outside(weights, bias)


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
