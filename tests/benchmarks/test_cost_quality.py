"""The measures of the cost-quality curve on answers whose curve is known by hand."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "cost_quality.py"


@pytest.fixture(scope="module")
def module() -> Any:
    spec = importlib.util.spec_from_file_location("cost_quality", FILE)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_sending_the_right_questions_first_recovers_the_gap_early(module: Any) -> None:
    weak, strong = np.array([0.0, 1, 1, 1]), np.array([1.0, 1, 1, 1])
    first, last = (module.measures(weak, strong, np.array(gain)) for gain in ([9.0, 0, 0, 0], [-9.0, 0, 0, 0]))
    assert first["cpt50"] == first["cpt80"] == 0.25 and last["cpt80"] == 1.0
    assert first["apgr"] == pytest.approx(0.8) and last["apgr"] == pytest.approx(0.2)
    for curve in (first["curve"], last["curve"]):
        assert curve[0] == {"strong_calls": 0.0, "accuracy": 0.75} and curve[-1] == {
            "strong_calls": 1.0,
            "accuracy": 1.0,
        }


def test_questions_that_say_nothing_give_the_straight_line(module: Any) -> None:
    rng = np.random.default_rng(0)
    weak, strong = (rng.random(2000) < share for share in (0.6, 0.8))
    measures = module.measures(weak.astype(float), strong.astype(float), rng.random(2000))
    assert measures["apgr"] == pytest.approx(0.5, abs=0.1)


def test_two_answers_are_as_alike_as_the_words_that_stand_in_both(module: Any) -> None:
    assert module._alike("The sum is 7", "the sum is 8") == pytest.approx(3 / 5)
    assert module._alike("", "") == 0.0 and module._alike("a", "A") == 1.0
