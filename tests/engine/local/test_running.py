"""The running batch between its callers: prompts in pieces, and answers that go back to make room."""

from __future__ import annotations

import random
from typing import Any

import pytest

from polymerge import load_model
from polymerge.engine import GenerateRequest
from polymerge.engine.admission import Limits
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.local.running import RunningBatch
from polymerge.engine.streaming import StreamRequest
from tests.conftest import Merged
from tests.engine.local.test_batching import endless, start, without_end
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def engines(merged: Merged, limits: Limits, architecture: str = "llama") -> tuple[HFEngine, BatchingEngine]:
    bundle, _ = merged(architecture)
    offline, running = (HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint="") for _ in range(2))
    return offline, BatchingEngine(running, limits)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_running_answers_get_a_token_after_every_piece_of_a_long_prompt(
    merged: Merged, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline, batching = engines(merged, Limits(max_rows=8, chunk_tokens=8, prefix_tokens=0), architecture)
    without_end(batching)
    pieces = [0]  # tokens that were read before each step
    read, step = RunningBatch.read, RunningBatch.step

    def reading(batch: RunningBatch, tokens: int) -> int:
        made = read(batch, tokens)
        pieces[-1] += made
        return made

    monkeypatch.setattr(RunningBatch, "read", reading)
    monkeypatch.setattr(RunningBatch, "step", lambda batch: (pieces.append(0), step(batch)))
    [first] = start(batching, endless())
    assert first.first.wait(30)
    sizes = (90, 70, 3, 2, 5, 7, 1)
    requests = [GenerateRequest([5 + n % 80 for n in range(size)], "e1", max_new_tokens=5) for size in sizes]
    pieces[:] = [0]
    heard = start(batching, *[StreamRequest(request) for request in requests])
    for request, one in zip(requests, heard, strict=True):
        assert one.text.startswith(offline.generate([request])[0].text)
    assert sum(pieces) >= sum(sizes) and max(pieces) <= 8
    batching.close(0)


def test_who_can_be_read_to_the_end_goes_first_and_long_prompts_take_turns(merged: Merged) -> None:
    engine = HFEngine(load_model(merged("llama")[0]), tiny_tokenizer(), fingerprint="")
    batch = RunningBatch(engine)
    short, *longs = [
        engine._answer(GenerateRequest([5] * size, "e1", max_new_tokens=4, ignore_eos=True), lambda heard: None)
        for size in (3, 40, 60)
    ]
    for answer in (*longs, short):
        batch.begin([answer])
    assert batch.read(8) == 3
    assert batch.rows == [short]
    assert [batch.read(8) for _ in range(7)] == [8] * 7  # four of one, three of the other
    assert batch.rows == [short]
    assert [batch.read(8), batch.rows] == [8, [short, longs[0]]]
    batch.clear()


def test_who_comes_while_others_are_read_does_not_wait_for_a_step(
    merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, batching = engines(merged, Limits(max_rows=4, chunk_tokens=16))
    without_end(batching)
    calls: list[str] = []
    read, step = RunningBatch.read, RunningBatch.step
    [first] = start(batching, endless())
    assert first.first.wait(30)
    later: list[Any] = []

    def reading(batch: RunningBatch, tokens: int) -> int:
        calls.append("read")
        if not later:
            later.extend(start(batching, StreamRequest(GenerateRequest([6, 7], "e0", max_new_tokens=2))))
        return read(batch, tokens)

    monkeypatch.setattr(RunningBatch, "read", reading)
    monkeypatch.setattr(RunningBatch, "step", lambda batch: (calls.append("step"), step(batch)))
    [newcomer] = start(batching, StreamRequest(GenerateRequest([8, 9], "e1", max_new_tokens=2)))
    assert newcomer.done.wait(30) and later[0].done.wait(30)
    place = calls.index("read")
    assert calls[place : place + 3] == ["read", "read", "step"]
    batching.close(0)


def test_an_answer_takes_the_room_that_it_uses_and_the_youngest_makes_room(
    merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten answers of up to 90 tokens in 200: two could run if all were reserved."""
    monkeypatch.setattr("polymerge.engine.admission.HEADROOM", 8)
    offline, batching = engines(merged, Limits(max_rows=8, cache_tokens=200))
    most, dropped = [0], list[int]()
    relieve = RunningBatch.relieve

    def watched(batch: RunningBatch, going: Any, tokens: int) -> None:
        relieve(batch, going, tokens)
        most[0] = max(most[0], len(batch))
        assert len(batch) < 2 or batch.tokens <= 200
        oldest = min((answer.number for answer in batch.answers), default=0)
        assert all(answer.number > oldest for answer in going)
        dropped.extend(answer.number for answer in going)

    monkeypatch.setattr(RunningBatch, "relieve", watched)
    draw = random.Random(0)
    requests = [
        GenerateRequest([draw.randrange(3, 96) for _ in range(5 + n)], f"e{n % 3}", max_new_tokens=85 - n, seed=n,
                        temperature=n % 2 * 0.8, ignore_eos=True)
        for n in range(10)
    ]  # fmt: skip
    expected = [offline.generate([request])[0] for request in requests]
    got = batching.generate(requests)
    assert [(one.text, one.tokens) for one in got] == [(one.text, one.tokens) for one in expected]
    assert most[0] > 3 and len(dropped) > 3
    batching.close()


def test_a_list_in_a_small_memory_goes_on_from_the_tokens_that_it_has(
    merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polymerge.engine.admission.HEADROOM", 8)
    bundle, _ = merged("llama")
    large, small = (
        HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint="", batch_tokens=tokens) for tokens in (9999, 150)
    )
    requests = [GenerateRequest([5, 6, 7 + n], f"e{n % 3}", max_new_tokens=60, ignore_eos=True) for n in range(6)]
    dropped: list[Any] = []
    relieve = RunningBatch.relieve
    monkeypatch.setattr(
        RunningBatch, "relieve", lambda batch, going, tokens: (relieve(batch, going, tokens), dropped.extend(going))
    )
    assert [g.text for g in small.generate(requests)] == [g.text for g in large.generate(requests)]
    assert dropped
