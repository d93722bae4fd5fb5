"""How unlike all training samples a vector is, and how likely it is then that it belongs to any known field.

Three signs are weighed against each other: that no field claims the vector (one logistic regression a field, against
all other fields and the background's texts), that no training sample is near (Sun et al. 2022, arXiv 2204.06507), and
that a text of the background is. Their weights are learned where the wording is new: clusters of every field and topics
of the background are kept away from the fit in turn, and measured (docs/log-router.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Floats, Ints

NEAREST = 5  # vectors whose distance counts
CLAIM_C = 10.0  # inverse strength of the L2 penalty of a claim
WEIGHT_C = 1.0  # and of the signs' weights, each sign over its spread


@dataclass(frozen=True)
class Outside:
    """The signs and their calibration: p(known) = 1 / (1 + exp(slope · (signs · mix - middle))).

    Attributes:
        weights, bias: [k, d] and [k], of the regressions.
        background: [b, d], the background's vectors; none in routers of before there was one.
        mix: weights of the signs; with the slope 0 of a fresh one nothing is unknown.
    """

    weights: FloatArray
    bias: FloatArray
    background: FloatArray
    mix: tuple[float, float, float] = (1.0, 0.0, 0.0)
    middle: float = 0.0
    slope: float = 0.0

    def signs(self, vectors: FloatArray, training: FloatArray) -> Floats:
        """[n, 3] of vectors [n, d]: minus the highest claim, 1 - mean cosine of the nearest training vectors [m, d],
        and the mean cosine of the nearest of the background, all of length 1."""
        wide = vectors.astype(np.float64)
        claims = wide @ self.weights.T.astype(np.float64) + self.bias
        signs: Floats = np.stack(
            [-claims.max(axis=1), 1 - _nearness(wide, training), _nearness(wide, self.background)], axis=1
        )
        return signs

    def known(self, signs: Floats) -> Floats:
        """[n] probabilities that vectors with these signs [n, 3] belong to a field."""
        strangeness = signs @ np.asarray(self.mix)
        probabilities: Floats = 1 / (1 + np.exp(np.clip(self.slope * (strangeness - self.middle), -50, 50)))
        return probabilities


def _nearness(vectors: Floats, others: FloatArray) -> Floats:
    """[n], mean cosine of the nearest others; 0 where there are none."""
    count = min(NEAREST, len(others))
    if not count:
        return np.zeros(len(vectors))
    cosines = vectors @ others.T.astype(np.float64)
    nearest: Floats = np.partition(cosines, len(others) - count, axis=1)[:, -count:].mean(axis=1)
    return nearest


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
    return Outside(weights, bias, background)


def calibrate_outside(outside: Outside, known: Floats, strange: Floats) -> Outside:
    """The same with its signs weighed, by those of known samples [n, 3] and of strangers [m, 3].

    A logistic regression whose weights are never negative: a greater sign never makes a text more familiar. Known
    samples and strangers have the same weight in all.
    """
    from scipy.optimize import minimize

    signs = np.concatenate([known, strange])
    spread = np.maximum(signs.std(axis=0), 1e-9)
    centre = signs.mean(axis=0)
    scaled = (signs - centre) / spread
    target = np.repeat([0.0, 1.0], [len(known), len(strange)])
    share = np.where(target > 0, 0.5 / max(len(strange), 1), 0.5 / max(len(known), 1)) * len(target)

    def loss(x: Floats) -> tuple[float, Floats]:
        score = scaled @ x[:3] + x[3]
        miss = share * (1 / (1 + np.exp(-score)) - target)
        value = (share * (np.logaddexp(0, score) - target * score)).sum() + (x[:3] ** 2).sum() / (2 * WEIGHT_C)
        return float(value), np.append(miss @ scaled + x[:3] / WEIGHT_C, miss.sum())

    fitted = minimize(loss, np.array([1.0, 0, 0, 0]), jac=True, bounds=[(0, None)] * 3 + [(None, None)]).x
    mix = fitted[:3] / spread
    slope = float(np.linalg.norm(mix))
    if slope < 1e-9:  # no sign tells them apart
        return replace(outside, slope=0.0)
    first, second, third = map(float, mix / slope)
    middle = float(centre @ mix - fitted[3]) / slope
    return replace(outside, mix=(first, second, third), middle=middle, slope=slope)
