"""When an expert is worth asking, against sums done by hand."""

import numpy as np
import pytest

from polymerge.router.cost import HIGHEST, LEAST, MOST, STRANGERS, USUAL, thresholds, usual

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


def test_the_usual_threshold_is_where_lost_requests_and_answered_strangers_cost_the_same() -> None:
    known, strange = np.linspace(0, 1, 1001), np.linspace(0, 1, 1001)
    even = usual(known, strange)
    assert even == pytest.approx(1 / (1 + STRANGERS), abs=2e-3)  # 3 t = 1 - t
    assert STRANGERS * (known < even).mean() == pytest.approx((strange >= even).mean(), abs=1e-2)
    assert usual(known**0.5, strange) > even > usual(known**2, strange)  # surer of requests: fewer strangers


def test_the_usual_threshold_stays_in_bounds() -> None:
    assert usual(np.full(9, 0.9), np.full(9, 0.1)) == HIGHEST and usual(np.full(9, 0.1), np.full(9, 0.9)) == HIGHEST
    assert usual(np.zeros(9), np.zeros(9)) == LEAST
    assert usual(np.ones(9), np.zeros(0)) == USUAL


def test_without_requests_the_background_alone_tells() -> None:
    assert usual(None, np.linspace(0, 1, 101) * 0.3) == pytest.approx(0.3 * 0.95)


def test_a_table_moves_the_threshold_that_it_is_given() -> None:
    table = {"math": {"math": 0.8, "average": 0.4}, "shell": {"math": 0.1, "shell": 0.6, "average": 0.5}}
    assert odds(thresholds(EXPERTS, "average", table, 0.25)["math"]) == pytest.approx(odds(0.25))
