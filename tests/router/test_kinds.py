"""Requests that stand in for a field's own: which ones are picked, and that no gate learns them as strangers."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from polymerge import fit_router
from polymerge.bundle.bundle import Bundle
from polymerge.engine.base import GenerateRequest, Generation, Score, ScoreRequest
from polymerge.router import training
from polymerge.router.background import background
from polymerge.router.kinds import MOST, alike_samples, kinds, spoken
from polymerge.router.samples import Sample
from tests.conftest import Merged
from tests.router.scripted import TOPICS, ScriptedEngine

REQUESTS = (
    Sample("grep the list", "on files"),
    Sample("something else there", "on files"),
    Sample("sum plus times", "on numbers"),
    Sample("count", "on numbers"),
    Sample("nothing at all", "on nothing"),
)
WORDS = {"math": "the sum of plus", "shell": "files to grep"}


class Wordy(ScriptedEngine):
    """Finds a word likely after a text that holds it."""

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [Score(-1.0 if set(r.continuation) & set(r.context) else -9.0, True, 1) for r in requests]


def picked(engine: ScriptedEngine, words: dict[str, str]) -> dict[str, list[str]]:
    samples = alike_samples(engine, words, REQUESTS)
    return {field: [s.text for s in samples if s.field == field] for field in words}


def test_requests_go_to_the_field_whose_words_fit_and_their_kind_helps() -> None:
    found = picked(Wordy(), WORDS)
    assert found["shell"][:2] == ["grep the list", "something else there"]  # the second by its kind alone
    assert found["math"][:2] == ["sum plus times", "count"]


def test_one_field_alone_takes_what_fits_it_more_than_other_texts() -> None:
    assert picked(Wordy(), {"shell": WORDS["shell"]}) == {"shell": ["grep the list", "something else there"]}


def test_no_request_is_of_two_fields_and_none_has_too_many() -> None:
    samples = alike_samples(Wordy(), {"shell": "folder files", "more": "files folder memory", "json": "list"})
    assert len({sample.text for sample in samples}) == len(samples)
    assert all(0 < sum(s.field == field for s in samples) <= MOST for field in ("more", "json"))


class Sure(ScriptedEngine):
    """Every expert answers in one word, sure of it after its own topic's words; to some texts it says nothing."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        assert all(request.max_new_tokens == 1 for request in requests)
        return [Generation("" if "all" in self.decode(list(r.prompt)) else "yes", 1, 1, "length") for r in requests]

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        assert all(self.decode(list(r.continuation)) == "yes" for r in requests)
        own = [set(TOPICS[str(r.expert)]) & set(self.decode(list(r.context)).split()) for r in requests]
        return [Score(-0.1 if words else -3.0, True, 1) for words in own]


def test_names_alone_are_told_apart_by_who_is_sure_of_the_answer() -> None:
    names = {"math": "math", "shell": "shell"}
    samples = alike_samples(Wordy(), names, REQUESTS, experts=Sure())
    found = {field: [s.text for s in samples if s.field == field] for field in names}
    assert found["math"][:2] == ["sum plus times", "count"] and found["shell"][0] == "grep the list"


def test_a_single_name_is_looked_up_like_words() -> None:
    """No other can be less sure of anything."""
    assert alike_samples(Wordy(), {"math": "sum"}, REQUESTS, experts=Sure()) == alike_samples(
        Wordy(), {"math": "sum"}, REQUESTS
    )


def test_an_engine_that_finds_all_words_alike_picks_nothing() -> None:
    assert alike_samples(ScriptedEngine(), WORDS) == []


def test_words_that_say_nothing_are_left_out_unless_all_do() -> None:
    assert spoken("What a bank's customers ask") == ["bank's", "customers", "ask"]
    assert spoken("to do") == ["to", "do"]
    assert spoken("C++") == ["c"] and spoken("!?") == ["!?"]


def test_requests_are_no_strangers_to_a_gate() -> None:
    texts = [sample.text for sample in kinds()]
    assert len(set(texts)) == len(texts) > 200
    assert not set(texts) & {sample.text for sample in background()}


def test_a_router_without_labels_is_fitted_to_them(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(shutil.copytree(merged("llama")[0].path, tmp_path / "bundle"))
    engine = Wordy(tuple(bundle.experts))
    monkeypatch.setattr(training, "load_engine", lambda *_: engine)
    names = list(bundle.experts)
    described = {names[0]: "folder files memory", names[1]: "cherries marbles boxes"}
    router = fit_router(bundle, describe=described, assign={name: name for name in described}).router
    texts = {sample.text for sample in router.samples}
    assert router.record.labelled == 0
    assert any("folder" in text for text in texts & {sample.text for sample in kinds()})
