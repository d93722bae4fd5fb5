"""Calibration against what is known of the numbers it is given, and against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from polymerge.router.calibrate import (
    accuracy_against_coverage,
    auroc,
    calibration_error,
    cross_fitted,
    fit_temperature,
    reliability,
    softmax,
    threshold_for_accuracy,
    threshold_for_coverage,
)
from polymerge.router.classify import LOGISTIC_C, fit_classifier
from polymerge.router.outside import Outside, calibrate_outside

RNG = np.random.default_rng(0)


def test_the_temperature_undoes_a_scaling_of_the_logits() -> None:
    logits = RNG.normal(size=(4000, 4))
    labels = np.array([RNG.choice(4, p=row) for row in softmax(logits)])
    assert fit_temperature(logits * 5, labels) == pytest.approx(5, rel=0.1)
    tempered = softmax(logits * 5 / fit_temperature(logits * 5, labels))
    right = tempered.argmax(1) == labels
    assert calibration_error(tempered.max(1), right) < 0.03 < calibration_error(softmax(logits * 5).max(1), right)


@pytest.mark.parametrize("count", [3, 30, 300])
def test_samples_that_are_all_right_are_no_proof(count: int) -> None:
    labels = np.arange(count) % 3
    logits = np.eye(3)[labels] * 3
    likeliest = softmax(logits / fit_temperature(logits, labels)).max(axis=1)
    assert likeliest == pytest.approx((count + 1) / (count + 2), abs=1e-3)


def test_calibration_error_of_what_is_known() -> None:
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    assert calibration_error(np.array([0.9, 0.9]), np.array([True, False])) == pytest.approx(0.4)
    assert sum(part["count"] for part in reliability(RNG.random(50), RNG.random(50) > 0.5)) == 50


@pytest.mark.parametrize("coverage", [0.1, 0.5, 0.9, 0.95, 1.0])
def test_a_threshold_keeps_the_wanted_share_and_no_more_than_it_must(coverage: float) -> None:
    confidence = RNG.random(200)
    threshold = threshold_for_coverage(confidence, coverage)
    kept = (confidence >= threshold).mean()
    assert coverage <= kept < coverage + 1 / 100


def test_a_threshold_for_an_accuracy_keeps_as_much_as_it_can() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.6, 0.5])
    right = np.array([True, True, False, True, True, False])
    assert threshold_for_accuracy(confidence, right, 1.0) == 0.8
    assert threshold_for_accuracy(confidence, right, 0.8) == 0.6
    assert threshold_for_accuracy(confidence, right, 0.5) == 0.5
    assert (confidence < threshold_for_accuracy(confidence, ~np.ones(6, dtype=bool), 0.5)).all()


def test_auroc_is_scikit_learns() -> None:
    inside, outside = np.round(RNG.normal(1, 1, 60), 1), np.round(RNG.normal(0, 1, 40), 1)  # with ties
    expected = roc_auc_score(np.repeat([1, 0], [60, 40]), np.concatenate([inside, outside]))
    assert auroc(inside, outside) == pytest.approx(expected)


def test_the_curve_ends_at_the_accuracy_of_all() -> None:
    confidence, right = RNG.random(250), RNG.random(250) > 0.3
    curve = accuracy_against_coverage(confidence, right)
    assert len(curve) == 100 and curve[-1]["coverage"] == 1
    assert curve[-1]["accuracy"] == pytest.approx(right.mean())


def calibrated(near: float, far: float) -> Outside:
    """An Outside whose first sign is `near` among known samples and `far` among strangers; the second says nothing."""
    inside = np.stack([RNG.normal(near, 0.03, 300), np.full(300, 0.5)], axis=1)
    outside = np.stack([RNG.normal(far, 0.03, 60), np.full(60, 0.5)], axis=1)
    nothing = np.zeros((1, 1), np.float32)
    return calibrate_outside(Outside(nothing, nothing[0], 1), inside, outside)


def test_signs_halfway_between_known_and_unknown_are_as_likely_either() -> None:
    chances = calibrated(0.2, 0.6).known(np.array([[0.2, 0.5], [0.6, 0.5], [0.4, 0.5]]))
    assert chances[0] > 0.9 and chances[1] < 0.1 and 0.2 < chances[2] < 0.8


def test_signs_that_point_the_wrong_way_are_not_turned_round() -> None:
    chances = calibrated(0.6, 0.2).known(np.array([[0.2, 0.5], [0.6, 0.5]]))
    assert chances[0] >= chances[1] and chances[0] == pytest.approx(chances[1], abs=0.01)


def test_calibration_error_is_of_folds_that_the_temperature_has_not_seen() -> None:
    logits = RNG.normal(size=(40, 3))
    labels = logits.argmax(axis=1)
    first = np.arange(40) % 5 == 0
    expected = softmax(logits[first] / fit_temperature(logits[~first], labels[~first]))
    assert np.allclose(cross_fitted(logits, labels)[first], expected)


@pytest.mark.parametrize("fields", [2, 5])
def test_classifiers_are_scikit_learns(fields: int) -> None:
    centres = RNG.normal(size=(fields, 8))
    labels = np.repeat(np.arange(fields), 20)
    vectors = (centres[labels] + RNG.normal(size=(len(labels), 8))).astype(np.float32)
    asked = (centres[labels] + RNG.normal(size=(len(labels), 8))).astype(np.float32)
    logistic = LogisticRegression(C=LOGISTIC_C, max_iter=1000).fit(vectors, labels)
    chances = softmax(fit_classifier("logistic", vectors, labels).logits(asked))
    assert np.allclose(chances, logistic.predict_proba(asked), atol=1e-5)
    centroid = NearestCentroid().fit(vectors, labels).predict(asked)
    assert np.array_equal(fit_classifier("centroid", vectors, labels).logits(asked).argmax(1), centroid)
    knn = KNeighborsClassifier(10, weights=lambda d: 1 / (d**2 + 1e-6)).fit(vectors, labels)
    assert np.array_equal(fit_classifier("knn", vectors, labels).logits(asked).argmax(1), knn.predict(asked))
