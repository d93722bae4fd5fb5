"""How unlike all training samples a vector is, and how likely it is then that it belongs to any known field.

Knows numbers only. The distance is that to the nearest training samples (Sun et al. 2022, arXiv 2204.06507).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Floats

NEAREST = 3  # training samples whose distance counts


@dataclass(frozen=True)
class Outside:
    """Calibration of a distance: p(known | strangeness) = 1 / (1 + exp(slope · (strangeness - middle))).

    Attributes:
        middle: the strangeness at which known and unknown are equally likely.
        slope: over 0.
    """

    middle: float = 1.0
    slope: float = 0.0

    def known(self, strangeness: Floats) -> Floats:
        """[n] probabilities of [n] distances."""
        found: Floats = 1 / (1 + np.exp(np.clip(self.slope * (strangeness - self.middle), -50, 50)))
        return found


def strangeness(vectors: FloatArray, training: FloatArray) -> Floats:
    """[n], 1 - mean cosine of vectors [n, d] and their nearest training vectors [m, d], all of length 1."""
    cosines = vectors.astype(np.float64) @ training.T.astype(np.float64)
    count = min(NEAREST, len(training))
    nearest = np.partition(cosines, len(training) - count, axis=1)[:, -count:]
    found: Floats = 1 - nearest.mean(axis=1)
    return found


def calibrate_outside(inside: Floats, outside: Floats) -> Outside:
    """Logistic regression on distances of known and of unknown samples, each kind with the same weight in all."""
    from sklearn.linear_model import LogisticRegression

    values = np.concatenate([inside, outside])
    centre, spread = values.mean(), max(float(values.std()), 1e-9)
    labels = np.repeat([0, 1], [len(inside), len(outside)])
    fitted = LogisticRegression(C=100.0, class_weight="balanced").fit(((values - centre) / spread)[:, None], labels)
    slope = max(float(fitted.coef_[0, 0]), 1e-3) / spread
    return Outside(float(centre - fitted.intercept_[0] / slope), slope)
