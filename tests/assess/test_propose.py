"""The proposal against a search written down by hand, and its words."""

import itertools
import random

import pytest

from polymerge.assess.propose import Choices, propose
from polymerge.assess.sizes import Family


def choices(**changes: object) -> Choices:
    base = {
        "fields": ["math", "code", "law"],
        "accuracy": {
            "a": {"math": 0.9, "code": 0.2, "law": 0.5},
            "b": {"math": 0.3, "code": 0.8, "law": 0.5},
            "c": {"math": 0.4, "code": 0.4, "law": 0.6},
            "t": {"math": 0.95, "code": 0.1},
        },
        "families": [Family(("a", "b", "c"), base_bytes=10_000_000_000, expert_bytes=1_000_000_000)],
        "thinkers": {},
        "working": {},
    }
    return Choices(**{**base, **changes})  # type: ignore[arg-type]


def test_every_useful_expert_is_taken_where_there_is_room() -> None:
    found = propose(choices())
    assert found.chosen and found.chosen.experts == ("a", "b", "c")
    assert found.chosen.best == {"math": "a", "code": "b", "law": "c"}
    assert found.chosen.accuracy == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    assert found.chosen.bytes == 13_000_000_000
    assert found.runner_up and found.runner_up.experts == ("a", "b")
    first, second = found.why.split("; ")
    assert first == "a + b + c reaches 76.7% in 13 GB"
    assert second == "next is a + b, 3.3% behind, most in law (50.0% against 60.0%)"
    assert found.exhaustive and found.sets == 7 and found.unlimited is None


def test_the_limit_counts_the_bundle_the_thinker_and_the_working_memory() -> None:
    found = propose(choices(limit=12.5e9))
    assert found.chosen and found.chosen.experts == ("a", "b")
    assert found.unlimited and found.unlimited.experts == ("a", "b", "c")
    assert "without the limit of 12.5 GB it would be a + b + c" in found.why
    found = propose(choices(limit=12.5e9, working={"b": 2_000_000_000}))
    assert found.chosen and found.chosen.experts == ("a", "c")
    found = propose(choices(limit=16.9e9, thinkers={"t": 5_000_000_000}))
    assert found.chosen and (found.chosen.experts, found.chosen.thinker) == (("a", "b", "c"), None)
    found = propose(choices(limit=18.5e9, thinkers={"t": 5_000_000_000}))
    assert found.chosen and found.chosen.thinker == "t" and found.chosen.best["math"] == "t"
    assert found.chosen.label == "b + c, with t thinking first"


def test_one_model_alone_needs_no_residual_and_idle_models_are_left_out() -> None:
    accuracy = {"a": {"math": 0.9, "code": 0.9, "law": 0.9}, "b": {"math": 0.1}, "c": {}}
    found = propose(choices(accuracy=accuracy))
    assert found.chosen and found.chosen.experts == ("a",) and found.chosen.bytes == 10_000_000_000
    assert found.runner_up and found.runner_up.experts == ("b",)  # not "a" with idle ones added


def test_what_fits_nowhere_is_said() -> None:
    found = propose(choices(limit=1e9))
    assert found.chosen is None and found.runner_up is None
    assert found.why == "nothing fits 1 GB; the best set needs 13 GB"
    assert propose(choices(families=[])).why == "no candidate could be measured"


def test_candidates_that_cannot_be_merged_are_never_in_one_set() -> None:
    families = [Family(("a", "c"), 10**9, 10**8), Family(("b",), 10**9, 0)]
    found = propose(choices(families=families))
    assert found.chosen and found.chosen.experts == ("a", "c") and found.sets == 4


def test_a_growing_search_says_so_and_is_near_the_exhaustive_one() -> None:
    rng = random.Random(0)
    names = [f"m{number}" for number in range(8)]
    fields = [f"f{number}" for number in range(5)]
    accuracy = {name: {field: rng.random() for field in fields} for name in names}
    family = Family(tuple(names), 10**9, 10**7)
    wide = choices(fields=fields, accuracy=accuracy, families=[family], most=3)
    exact, grown = propose(wide), propose(wide, exhaustive_sets=10)
    best = max(
        sum(max(accuracy[name][field] for name in names_) for field in fields) / 5
        for names_ in itertools.combinations(names, 3)
    )
    assert exact.exhaustive and exact.chosen and exact.chosen.accuracy == pytest.approx(best)
    assert not grown.exhaustive and grown.chosen and grown.chosen.accuracy >= 0.95 * best
    assert grown.sets < exact.sets
