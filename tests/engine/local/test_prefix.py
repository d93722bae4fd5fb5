"""Beginnings that were read before: what is kept and forgotten, and answers that are the same with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from polymerge import load_model
from polymerge.engine import GenerateRequest
from polymerge.engine.admission import Limits
from polymerge.engine.answer import Collector
from polymerge.engine.local import prefix
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.cache import rope_is_fixed
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.local.prefix import PrefixCache, common
from polymerge.engine.local.reading import Reading
from polymerge.engine.local.running import RunningBatch
from tests.conftest import Merged
from tests.tiny import COMMON, tiny_tokenizer

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
        left = reading.left
        result = through(reading, columns)
        pieces.append((len(reading.answers), left - reading.left))
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
    assert cache.holds
    cache.keep("e0", list(range(20)), [*layers(20), *layers(24)], 0)
    assert cache.tokens == 0 and not cache.holds


def test_layers_with_a_hole_are_not_kept_and_shared_ones_at_the_end_are() -> None:
    without = DynamicLayer()  # Mllama's layers that look at a picture: their numbers would be lost
    hole, shared = PrefixCache(100), PrefixCache(100)
    first, second = layers(20)
    hole.keep("e0", list(range(20)), [first, without, second], 0)
    assert hole.tokens == 0 and not hole.holds
    shared.keep("e0", list(range(20)), [first, second, without], 0)
    assert shared.tokens == 16 and shared.holds


def test_where_nothing_can_be_remembered_nobody_waits_for_it(merged: Merged) -> None:
    engine = HFEngine(load_model(merged("llama")[0]), tiny_tokenizer(), fingerprint="")
    answers = engine._answers([GenerateRequest([*SYSTEM, 7 + n], "e0") for n in range(16)], [Collector()] * 16)
    assert RunningBatch(engine, prefix_tokens=7).apart(answers) == ([answers], [])
    assert RunningBatch(engine, prefix_tokens=8).apart(answers) == ([answers[:1]], answers[1:])


def test_what_is_remembered_goes_with_all_else_where_memory_ran_out(merged: Merged) -> None:
    engine = HFEngine(load_model(merged("llama")[0]), tiny_tokenizer(), fingerprint="")
    batch = RunningBatch(engine, prefix_tokens=100)
    batch.join(engine._answers([GenerateRequest(SYSTEM, "e0")], [Collector()]))
    assert batch._prefixes.tokens == 48
    batch.clear()
    assert batch._prefixes.tokens == 0


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rope_that_looks_at_the_whole_pass_reads_prompts_whole_and_remembers_nothing(
    kind: str, read: list[tuple[int, int]]
) -> None:
    """Of the frequencies of a long prompt nothing stays for a short one that begins alike."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        width = COMMON["hidden_size"] // COMMON["num_attention_heads"] // 2
        rope |= {"short_factor": [1.0] * width, "long_factor": [4.0] * width, "original_max_position_embeddings": 32}
    torch.manual_seed(0)
    config_of = {"longrope": hf.Phi3Config, "dynamic": hf.LlamaConfig}[kind]
    config = config_of(**(COMMON | {"rope_parameters": rope, "max_position_embeddings": 32}))
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config = hf.GenerationConfig(eos_token_id=[2], pad_token_id=0)
    long, short = [*SYSTEM, *range(5, 35)], SYSTEM[:20]

    def by_transformers(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        made: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[
            0, len(prompt) :
        ].tolist()
        return made

    expected = [by_transformers(prompt) for prompt in (long, short)]
    engine = HFEngine(model, tiny_tokenizer(), fingerprint="")
    engine.voices.average = replace(engine.voices.average, max_length=128)
    batching = BatchingEngine(engine, Limits(chunk_tokens=8))
    for prompt, tokens in zip((long, short), expected, strict=True):
        [answer] = batching.generate([GenerateRequest(prompt, max_new_tokens=6)])
        assert answer.text == batching._engine.decode([token for token in tokens if token != 2])
    batching.close()
    assert read == [(1, len(long)), (1, len(short))]


def test_an_experts_own_rope_counts_too() -> None:
    own = torch.nn.Module()
    own.config = hf.Phi3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert rope_is_fixed([torch.nn.Linear(1, 1), own])
    layered = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    own.config = SimpleNamespace(rope_parameters=layered)  # type: ignore[assignment]
    assert not rope_is_fixed([torch.nn.Linear(1, 1), own])


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
