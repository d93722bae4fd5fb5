"""How unlike all training samples a vector is, and how likely it is then that it belongs to any known field.

Two signs are added up: that no field claims the vector (one logistic regression a field, against the rest), and that
no training sample is near (Sun et al. 2022, arXiv 2204.06507). docs/log-router.md says what else was tried.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Floats, Ints

NEAREST = 5  # training samples whose distance counts
SIGNS = (1.0, 0.3)  # weights of the two signs, each over its spread among known samples
CLAIM_C = 10.0  # inverse strength of the L2 penalty


@dataclass(frozen=True)
class Outside:
    """The two signs and their calibration: p(known) = 1 / (1 + exp(slope · (signs · mix - middle))).

    Attributes:
        weights, bias: [k, d] and [k], of the regressions; zeros where there is a single field.
        mix: [2], weights of the signs; with the slope 0 of a fresh one nothing is unknown.
    """

    weights: FloatArray
    bias: FloatArray
    mix: tuple[float, float] = SIGNS
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


def fit_outside(vectors: FloatArray, labels: Ints) -> Outside:
    """Fits the regressions to vectors [n, d] of length 1; not calibrated yet."""
    from sklearn.linear_model import LogisticRegression

    fields = np.unique(labels)
    weights, bias = np.zeros((len(fields), vectors.shape[1]), np.float32), np.zeros(len(fields), np.float32)
    for row, field in enumerate(fields if len(fields) > 1 else ()):
        fitted = LogisticRegression(C=CLAIM_C, max_iter=1000, class_weight="balanced").fit(vectors, labels == field)
        weights[row], bias[row] = fitted.coef_[0], fitted.intercept_[0]
    return Outside(weights, bias)


def calibrate_outside(inside: Floats, outside: Floats) -> tuple[tuple[float, float], float, float]:
    """mix, middle and slope from the signs of known samples [n, 2] and of strangers [m, 2].

    A logistic regression on the added signs; known samples and strangers have the same weight in all.
    """
    from sklearn.linear_model import LogisticRegression

    spread = np.maximum(inside.std(axis=0), 1e-9)
    mix = (float(SIGNS[0] / spread[0]), float(SIGNS[1] / spread[1]))
    values = np.concatenate([inside, outside]) @ np.asarray(mix)
    centre, width = float(values.mean()), max(float(values.std()), 1e-9)
    strange = np.repeat([0, 1], [len(inside), len(outside)])
    fitted = LogisticRegression(C=100.0, class_weight="balanced").fit(((values - centre) / width)[:, None], strange)
    slope = max(float(fitted.coef_[0, 0]), 1e-3)  # a greater distance never makes a sample more familiar
    return mix, centre - float(fitted.intercept_[0]) / slope * width, slope / width
