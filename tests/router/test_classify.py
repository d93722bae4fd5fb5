"""What a regression leans towards is told apart by it as well, in the measure that is meant."""

import numpy as np
import pytest

from polymerge.router.classify import LEAN, fit_classifier, leaned

AXES = np.eye(4, dtype=np.float32)
LABELS = np.array([0, 1])


def spread(logits: np.ndarray) -> float:
    return float((logits - logits.mean(axis=1, keepdims=True)).std())


def test_it_knows_its_own_samples_and_the_others() -> None:
    own = fit_classifier("logistic", AXES[:2], LABELS)
    assert np.ptp(own.logits(AXES[2:]), axis=1) == pytest.approx(0, abs=1e-3)
    both = leaned(own, AXES[2:], LABELS, AXES)
    assert both.logits(AXES).argmax(axis=1).tolist() == [0, 1, 0, 1]


def test_what_is_added_has_its_share_of_the_spread_on_strangers() -> None:
    rng = np.random.default_rng(0)
    strange = rng.normal(size=(50, 4)).astype(np.float32)
    own = fit_classifier("logistic", AXES[:2], LABELS)
    added = leaned(own, AXES[2:], LABELS, strange).logits(strange) - own.logits(strange)
    assert spread(added) / spread(own.logits(strange)) == pytest.approx(LEAN, rel=1e-4)


def test_samples_that_say_nothing_change_nothing() -> None:
    own = fit_classifier("logistic", AXES[:2], LABELS)
    same = leaned(own, AXES[[2, 2]], LABELS, AXES)
    assert all(np.array_equal(own.arrays[name], same.arrays[name]) for name in own.arrays)
