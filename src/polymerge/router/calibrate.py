"""How sure a router may say it is: temperature, calibration error, thresholds, and curves to draw.

Pure functions on arrays; knows neither texts nor models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Floats: TypeAlias = "npt.NDArray[np.float64]"
Bools: TypeAlias = "npt.NDArray[np.bool_]"
Ints: TypeAlias = "npt.NDArray[np.int64]"

TEMPERATURES = (0.05, 20.0)  # looked at
ECE_BINS = 10


def softmax(logits: Floats) -> Floats:
    """Rows of [n, k] as probabilities."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Floats = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """The T that makes softmax(logits / T) likeliest on held-out samples (Guo et al. 2017, arXiv 1706.04599, 4.2).

    The right column's target is (n + 1) / (n + 2) instead of 1 (Platt 1999): n samples that are all right are no proof
    that the next one will be, and would otherwise ask for a temperature of 0.

    Args:
        logits: [n, k]. labels: [n], numbers of the right columns.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        peak = scaled.max(axis=1)
        log_sum = peak + np.log(np.exp(scaled - peak[:, None]).sum(axis=1))
        right = scaled[np.arange(len(labels)), labels]
        return float((log_sum - (1 - doubt) * right - doubt * scaled.mean(axis=1)).mean())

    # the doubt is shared by all columns, the right one among them
    doubt = min(1 / (len(labels) + 2) * logits.shape[1] / max(logits.shape[1] - 1, 1), 1.0)
    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def cross_fitted(logits: Floats, labels: Ints, folds: int = 5) -> Floats:
    """Probabilities [n, k], each by a temperature that was fitted to the other folds."""
    folds = min(folds, len(labels))
    if folds < 2:
        return softmax(logits / fit_temperature(logits, labels))
    probabilities = np.empty_like(logits)
    for fold in range(folds):
        away = np.arange(len(labels)) % folds == fold
        probabilities[away] = softmax(logits[away] / fit_temperature(logits[~away], labels[~away]))
    return probabilities


def reliability(confidence: Floats, right: Bools, bins: int = ECE_BINS) -> list[dict[str, float]]:
    """Bins of equal width that hold samples: their number, mean confidence and share of right ones."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    filled = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            means = {"confidence": float(confidence[inside].mean()), "accuracy": float(right[inside].mean())}
            filled.append({"count": int(inside.sum()), **means})
    return filled


def calibration_error(confidence: Floats, right: Bools, bins: int = ECE_BINS) -> float:
    """Expected calibration error: mean |accuracy - confidence| over the bins, weighted by their samples."""
    parts = reliability(confidence, right, bins)
    return sum(part["count"] * abs(part["accuracy"] - part["confidence"]) for part in parts) / max(len(confidence), 1)


def threshold_for_coverage(confidence: Floats, coverage: float) -> float:
    """The highest threshold at which at least `coverage` of these samples are at or over it."""
    kept = int(np.ceil(round(coverage * len(confidence), 9)))
    return float(np.sort(confidence)[::-1][kept - 1]) if kept else 1.0


def threshold_for_accuracy(confidence: Floats, right: Bools, accuracy: float) -> float:
    """The lowest threshold at and over which at least `accuracy` of the samples are right; over all of them if none."""
    order = np.argsort(-confidence, kind="stable")
    shares = np.cumsum(right[order]) / np.arange(1, len(right) + 1)
    last_of_ties = np.append(np.diff(confidence[order]) != 0, True)
    good = np.flatnonzero((shares >= accuracy) & last_of_ties)
    return float(confidence[order][good[-1]]) if len(good) else float(np.nextafter(confidence.max(), 2))


def accuracy_against_coverage(confidence: Floats, right: Bools) -> list[dict[str, float]]:
    """Share of samples kept and of right ones among them, for every threshold from the highest confidence down."""
    order = np.argsort(-confidence, kind="stable")
    counts = np.arange(1, len(right) + 1)
    shares = np.cumsum(right[order]) / counts
    kept = np.unique(np.linspace(0, len(right) - 1, min(100, len(right))).astype(int))
    return [
        {
            "coverage": float(counts[n] / len(right)),
            "accuracy": float(shares[n]),
            "threshold": float(confidence[order][n]),
        }
        for n in kept
    ]


def auroc(inside: Floats, outside: Floats) -> float:
    """Probability that a sample of `inside` scores higher than one of `outside`; ties count half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    return float((ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))
