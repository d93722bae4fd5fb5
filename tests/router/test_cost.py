"""When an expert is worth asking, against sums done by hand."""

import numpy as np
import pytest

from polymerge.router.cost import LEAST, MOST, USUAL, thresholds, usual

EXPERTS = {"math": "math", "shell": "shell"}


def odds(threshold: float) -> float:
    return threshold / (1 - threshold)


def test_without_a_table_or_without_the_fallback_in_it_nothing_is_said() -> None:
    assert thresholds(EXPERTS, "average", None, USUAL) == {}
    assert thresholds(EXPERTS, "average", {"math": {"math": 0.9}, "shell": {"shell": 0.9}}, USUAL) == {}
    assert thresholds({"math": "math"}, "average", {"math": {"math": 0.9, "average": 0.1}}, USUAL) == {}


def test_an_expert_is_asked_sooner_the_more_it_gains_and_the_less_it_loses() -> None:
    table = {
        "math": {"math": 0.8, "shell": 0.1, "average": 0.4},
        "shell": {"math": 0.1, "shell": 0.6, "average": 0.5},
    }
    chosen = thresholds(EXPERTS, "average", table, USUAL)
    assert odds(chosen["math"]) == pytest.approx(odds(USUAL) * 0.4 / 0.4)
    assert odds(chosen["shell"]) == pytest.approx(odds(USUAL) * MOST)  # loses 0.3 to gain 0.1


def test_an_expert_that_loses_nothing_is_not_asked_by_every_stranger() -> None:
    table = {"math": {"math": 0.8, "shell": 0.4, "average": 0.4}, "shell": {"math": 0.5, "shell": 0.6, "average": 0.5}}
    assert odds(thresholds(EXPERTS, "average", table, USUAL)["math"]) == pytest.approx(odds(USUAL) / MOST)


def test_the_usual_threshold_refuses_so_much_of_the_background_within_bounds() -> None:
    assert usual(np.linspace(0, 1, 101) * 0.3) == pytest.approx(0.3 * 0.85)
    assert usual(np.full(9, 0.9)) == USUAL and usual(np.zeros(9)) == LEAST and usual(np.zeros(0)) == USUAL


def test_a_table_moves_the_threshold_that_it_is_given() -> None:
    table = {"math": {"math": 0.8, "average": 0.4}, "shell": {"math": 0.1, "shell": 0.6, "average": 0.5}}
    assert odds(thresholds(EXPERTS, "average", table, 0.25)["math"]) == pytest.approx(odds(0.25))
