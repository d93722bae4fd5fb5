"""Beginnings that were read before: what is kept and forgotten, and answers that are the same with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from polymerge import load_model
from polymerge.engine import GenerateRequest
from polymerge.engine.admission import Limits
from polymerge.engine.local import prefix
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.local.prefix import PrefixCache, common
from polymerge.engine.local.reading import Reading
from tests.conftest import Merged
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SYSTEM = [5 + n % 80 for n in range(50)]


@pytest.fixture(autouse=True)
def blocks_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "BLOCK", 8)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of every piece that was read."""
    pieces, through = list[tuple[int, int]](), Reading.read

    def watched(reading: Reading, columns: int) -> Any:
        before = reading._column
        result = through(reading, columns)
        pieces.append((len(reading.answers), reading._column - (before or reading.known)))
        return result

    monkeypatch.setattr(Reading, "read", watched)
    return pieces


def layers(tokens: int, layer_count: int = 2) -> list[Any]:
    cache = DynamicCache()
    for number in range(layer_count):
        states = torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(number))
        cache.update(states, -states, number)
    return list(cache.layers)


def test_whole_blocks_are_kept_for_the_same_expert_alone() -> None:
    cache, tokens, states = PrefixCache(1000), list(range(30)), layers(30)
    cache.keep("e0", tokens, states, 0)
    assert cache.tokens == 24 and cache.known("e0", tokens) == 24
    assert cache.known("e0", tokens[:24]) == 16  # the last token is read for what comes after it
    assert cache.known("e0", [*tokens[:12], 99, *tokens[13:]]) == 8
    assert not any(cache.known(other, tokens) for other in ("e1", None, {"e0": 0.5, "e1": 0.5}))
    held = cache.states("e0", tokens, 13)
    for number, layer in enumerate(states):
        assert torch.equal(held[0, number], layer.keys[0, :, :13])
        assert torch.equal(held[1, number], layer.values[0, :, :13])


def test_experts_are_one_however_they_are_written() -> None:
    cache, tokens = PrefixCache(1000), list(range(20))
    cache.keep(None, tokens, layers(20), 0)
    assert cache.known("average", tokens) == 16
    cache.keep({"e0": 1.0, "e1": 3.0}, tokens, layers(20), 0)
    assert cache.known({"e1": 0.75, "e0": 0.25, "e2": 0.0}, tokens) == 16
    assert common(None, tokens, "average", [*tokens[:18], 3]) == 16 and common("e0", tokens, "e1", tokens) == 0


def test_what_was_used_last_stays_and_a_beginning_outlives_its_end() -> None:
    cache = PrefixCache(48)
    first, second = list(range(24)), list(range(100, 124))
    cache.keep("e0", first, layers(24), 0)
    cache.keep("e0", second, layers(24), 0)
    assert cache.tokens == 48
    cache.states("e0", [*first, 1], 24)  # used again
    cache.keep("e0", [*first[:8], *range(200, 216)], layers(24), 0)
    assert cache.tokens == 48 and cache.known("e0", [*first, 1]) == 24
    assert cache.known("e0", [*second, 1]) == 8
    cache.fit(10)
    assert cache.tokens == 8 and cache.known("e0", [*first, 1]) == 8
    cache.fit(-5)
    assert cache.tokens == 0


def test_layers_of_several_shapes_are_not_kept() -> None:
    cache = PrefixCache(100)
    cache.keep("e0", list(range(20)), [*layers(20), *layers(24)], 0)
    assert cache.tokens == 0


@pytest.fixture(params=["llama", "gemma3", "gpt2"])
def pair(merged: Merged, request: pytest.FixtureRequest) -> Iterator[tuple[HFEngine, BatchingEngine]]:
    offline, running = (
        HFEngine(load_model(merged(request.param)[0]), tiny_tokenizer(), fingerprint="") for _ in range(2)
    )
    batching = BatchingEngine(running, Limits(max_rows=8))
    yield offline, batching
    batching.close(0)


def test_a_shared_beginning_is_read_once_and_answers_are_the_same(
    pair: tuple[HFEngine, BatchingEngine], read: list[tuple[int, int]]
) -> None:
    offline, batching = pair
    experts: list[Any] = ["e0", "e0", "e0", "e1", None, "e0", {"e0": 0.5, "e1": 0.5}, {"e1": 2.0, "e0": 2.0}]
    requests = [
        GenerateRequest([*SYSTEM, *range(10, 13 + n)], expert, max_new_tokens=12) for n, expert in enumerate(experts)
    ]
    expected = [offline.generate([request])[0].text for request in requests]
    read.clear()
    assert [g.text for g in batching.generate(requests)] == expected  # at once: the first of an expert goes before
    once = sum(rows * columns for rows, columns in read)
    assert once < 4 * 60 + 6 * 30  # four experts' beginnings, and what is behind them
    read.clear()
    assert [g.text for g in batching.generate(requests)] == expected
    assert sum(rows * columns for rows, columns in read) < 8 * 30


def test_scored_prompts_are_read_whole(pair: tuple[HFEngine, BatchingEngine]) -> None:
    from polymerge.engine.streaming import StreamRequest
    from tests.engine.local.test_batching import start

    _, batching = pair
    request = GenerateRequest([*SYSTEM, 7], "e0", max_new_tokens=4)
    batching.generate([request])
    [heard] = start(batching, StreamRequest(request, logprobs=0, score_prompt=True))
    assert heard.text is not None and len(heard.pieces[0].prompt_scores) == len(SYSTEM) + 1
