"""A running engine goes on with another model: fewer experts or more, and no answer is cut."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from polymerge import Bundle, load_model
from polymerge.engine import GenerateRequest, ScoreRequest
from polymerge.engine.admission import Limits
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.streaming import StreamRequest
from polymerge.errors import BundleError, DeadlineError, ModelError
from tests.conftest import Merged
from tests.engine.local.test_batching import Heard, start
from tests.tiny import tiny_tokenizer


def loaded(bundle: Bundle) -> HFEngine:
    engine = HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint=bundle.digest)
    voices = engine.voices  # answers end at their budget
    voices.average = replace(voices.average, defaults=replace(voices.average.defaults, ends=frozenset()))
    return engine


@pytest.fixture
def bundle(merged: Merged) -> Bundle:
    return merged("llama")[0]


@pytest.fixture
def batching(bundle: Bundle) -> Iterator[BatchingEngine]:
    made = BatchingEngine(loaded(bundle), Limits(max_rows=5))
    yield made
    made.close(0)


def asked(expert: Any, tokens: int = 60) -> StreamRequest:
    return StreamRequest(GenerateRequest([5, 6, 7], expert, tokens))


def test_a_bundle_with_some_experts_answers_as_the_whole_one(bundle: Bundle) -> None:
    whole, part = loaded(bundle), loaded(bundle.only(["e2", "e0"]))
    assert part.experts == ["e0", "e2"] and bundle.experts == ["e0", "e1", "e2"]
    requests = [GenerateRequest([5, 6, 7], expert, 20) for expert in ("e2", "e0", None, {"e0": 0.3, "e2": 0.7})]
    assert part.generate(requests) == whole.generate(requests)
    with pytest.raises(ModelError, match="no expert 'e1'"):
        part.generate([GenerateRequest([5], "e1", 2)])
    with pytest.raises(BundleError, match="e9"):
        bundle.only(["e9"])


def test_answers_go_on_with_the_other_model(bundle: Bundle, batching: BatchingEngine) -> None:
    expected = [answer.text for answer in loaded(bundle).generate([asked(e).generate for e in ("e0", "e2", None)])]
    step = batching._batch.step
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.02)
        step()

    batching._batch.step = slow  # type: ignore[method-assign]
    heard = start(batching, asked("e0"), asked("e2"), asked(None))
    assert begun.wait(30)
    other = loaded(bundle.only(["e0", "e2"]))
    batching.replace(other, 30)
    assert not all(one.done.is_set() for one in heard)
    assert [one.text for one in heard] == expected
    assert batching._engine is other and batching.experts == ["e0", "e2"]
    assert batching.loglikelihood([ScoreRequest([5], [6], "e2")])
    with pytest.raises(ModelError, match="no expert 'e1'"):
        start(batching, asked("e1"))
    batching.replace(loaded(bundle), 30)
    assert start(batching, asked("e1"))[0].text


def test_answers_of_an_expert_that_leaves_end_first(bundle: Bundle, batching: BatchingEngine) -> None:
    gate, step = threading.Event(), batching._batch.step
    batching._batch.step = lambda: (gate.wait(30), step())  # type: ignore[method-assign, assignment, return-value]
    leaving: Heard = start(batching, asked({"e1": 0.5, "e0": 0.5}, 40))[0]
    thread = threading.Thread(target=batching.replace, args=(loaded(bundle.only(["e0", "e2"])), 30))
    thread.start()
    for _ in range(3000):
        if batching.experts == ["e0", "e2"]:
            break
        time.sleep(0.01)
    with pytest.raises(ModelError, match="'e1' is being unloaded"):
        start(batching, asked("e1"))
    stays = start(batching, asked("e2", 5))[0]
    assert thread.is_alive()
    gate.set()
    assert leaving.text and leaving.pieces[-1].tokens == 40 and stays.text
    thread.join(30)
    assert batching._engine.experts == ["e0", "e2"]


def test_an_answer_that_does_not_end_in_time_keeps_its_expert(bundle: Bundle, batching: BatchingEngine) -> None:
    gate, step = threading.Event(), batching._batch.step
    batching._batch.step = lambda: (gate.wait(30), step())  # type: ignore[method-assign, assignment, return-value]
    heard = start(batching, asked("e1", 10))[0]
    with pytest.raises(DeadlineError, match="answers of e1"):
        batching.replace(loaded(bundle.only(["e0"])), 0.2)
    gate.set()
    assert heard.text and batching.experts == ["e0", "e1", "e2"]
