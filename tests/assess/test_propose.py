"""The proposal against a search written down by hand, and its words."""

import itertools
import random
from pathlib import Path

import pytest

from polymerge import load_recipe
from polymerge.assess.propose import Choices, propose
from polymerge.assess.sizes import Family, families
from polymerge.recipe.merge import Recipe
from polymerge.recipe.source import Source
from tests.tiny import make_experts, tiny_tokenizer


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
    proposal = propose(choices())
    assert proposal.chosen and proposal.chosen.experts == ("a", "b", "c")
    assert proposal.chosen.best == {"math": "a", "code": "b", "law": "c"}
    assert proposal.chosen.accuracy == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    assert proposal.chosen.bytes == 13_000_000_000
    assert proposal.runner_up and proposal.runner_up.experts == ("a", "b")
    first, second = proposal.why.split("; ")
    assert first == "a + b + c reaches 76.7% in 13 GB"
    assert second == "next is a + b, 3.3% behind, most in law (50.0% against 60.0%)"
    assert proposal.exhaustive and proposal.sets == 7 and proposal.unlimited is None


def test_the_limit_counts_the_bundle_the_thinker_and_the_working_memory() -> None:
    proposal = propose(choices(limit=12.5e9))
    assert proposal.chosen and proposal.chosen.experts == ("a", "b")
    assert proposal.unlimited and proposal.unlimited.experts == ("a", "b", "c")
    assert "without the limit of 12.5 GB it would be a + b + c" in proposal.why
    proposal = propose(choices(limit=12.5e9, working={"b": 2_000_000_000}))
    assert proposal.chosen and proposal.chosen.experts == ("a", "c")
    proposal = propose(choices(limit=16.9e9, thinkers={"t": 5_000_000_000}))
    assert proposal.chosen and (proposal.chosen.experts, proposal.chosen.thinker) == (("a", "b", "c"), None)
    proposal = propose(choices(limit=18.5e9, thinkers={"t": 5_000_000_000}))
    assert proposal.chosen and proposal.chosen.thinker == "t" and proposal.chosen.best["math"] == "t"
    assert proposal.chosen.label == "b + c, with t thinking first"


def test_one_model_alone_needs_no_residual_and_idle_models_are_left_out() -> None:
    accuracy = {"a": {"math": 0.9, "code": 0.9, "law": 0.9}, "b": {"math": 0.1}, "c": {}}
    proposal = propose(choices(accuracy=accuracy))
    assert proposal.chosen and proposal.chosen.experts == ("a",) and proposal.chosen.bytes == 10_000_000_000
    assert proposal.runner_up and proposal.runner_up.experts == ("b",)  # not "a" with idle ones added


def test_what_fits_nowhere_is_said() -> None:
    proposal = propose(choices(limit=1e9))
    assert proposal.chosen is None and proposal.runner_up is None
    assert proposal.why == "nothing fits 1 GB; the best set needs 13 GB"
    assert propose(choices(families=[])).why == "no candidate could be measured"


def test_candidates_that_cannot_be_merged_are_never_in_one_set() -> None:
    families = [Family(("a", "c"), 10**9, 10**8), Family(("b",), 10**9, 0)]
    proposal = propose(choices(families=families))
    assert proposal.chosen and proposal.chosen.experts == ("a", "c") and proposal.sets == 4


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


def test_candidates_that_fit_the_first_and_not_each_other_are_of_two_families(tmp_path: Path) -> None:
    """The first has no tokenizer; the tokens of the others contradict each other."""
    paths = make_experts("llama", tmp_path)
    for name in ("e1", "e2"):
        tiny_tokenizer().save_pretrained(paths[name])
    file = paths["e2"] / "tokenizer.json"
    file.write_text(file.read_text().replace('"w40"', '"x"').replace('"w50"', '"w40"').replace('"x"', '"w50"'))
    sources = {name: Source(source=str(path)) for name, path in paths.items()}

    def recipe(names: list[str]) -> Recipe:
        return load_recipe({"experts": {name: str(paths[name]) for name in names}})

    made, notes = families(sources, recipe)
    assert [family.members for family in made] == [("e0", "e1"), ("e2",)]
    [note] = notes
    assert note.startswith(
        "e0, e1 and e2 cannot be merged: expert 'e1' and expert 'e2' have other vocabularies: token 40"
    )
