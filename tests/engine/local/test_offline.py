"""Answers without a server: rows come and go, memory runs out, and models whose rows must stay together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from polymerge.engine import GenerateRequest
from polymerge.engine.local.cache import joins
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.local.running import RunningBatch
from polymerge.errors import ModelError
from tests.tiny import COMMON, tiny_tokenizer

REQUESTS = [
    GenerateRequest([5 + n] * (1 + 3 * n), max_new_tokens=4 + 5 * (n % 4), repetition_penalty=1.2) for n in range(9)
]


@pytest.fixture
def engine(checkpoints: Callable[[str], dict[str, Path]]) -> HFEngine:
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints("llama")["e0"])
    return HFEngine(model, tiny_tokenizer(), fingerprint="")


def test_rows_that_become_free_are_filled(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [engine.generate([request])[0] for request in REQUESTS]
    joined: list[tuple[int, int]] = []
    join = RunningBatch.join

    def watched(batch: RunningBatch, newcomers: Any) -> None:
        joined.append((len(batch), len(newcomers)))
        join(batch, newcomers)

    monkeypatch.setattr(RunningBatch, "join", watched)
    engine.batch_tokens = 130
    assert engine.generate(REQUESTS) == alone
    assert any(running for running, _ in joined) and max(running + new for running, new in joined) < len(REQUESTS)


def test_a_batch_that_runs_out_of_memory_goes_on_as_halves(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.generate(REQUESTS)
    step, join, most = RunningBatch.step, RunningBatch.join, [0]

    def small(batch: RunningBatch) -> None:
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        most[0] = max(most[0], len(batch))
        step(batch)

    def small_join(batch: RunningBatch, newcomers: Any) -> None:
        if len(newcomers) > 6:
            raise torch.OutOfMemoryError
        join(batch, newcomers)

    monkeypatch.setattr(RunningBatch, "step", small)
    monkeypatch.setattr(RunningBatch, "join", small_join)
    assert engine.generate(REQUESTS) == whole and most[0] == 2

    def never(batch: RunningBatch) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(RunningBatch, "step", never)
    with pytest.raises(ModelError, match="out of memory on one request"):
        engine.generate(REQUESTS)


def test_answers_are_heard_piece_by_piece(engine: HFEngine) -> None:
    request = REQUESTS[3]
    heard: list[Any] = []
    engine.stream([request], [heard.append])
    answer = engine.generate([request])[0]
    assert "".join(piece.text for piece in heard) == answer.text and len(heard) > 2
    assert (heard[-1].tokens, heard[-1].finish) == (answer.tokens, answer.finish)


FIXED = {
    "mamba": lambda: hf.MambaConfig(
        vocab_size=96, hidden_size=48, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "lfm2": lambda: hf.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]),
}


@pytest.mark.parametrize("architecture", FIXED)
def test_models_that_keep_more_than_keys_and_values_answer_as_transformers_does(architecture: str) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FIXED[architecture]()).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config = hf.GenerationConfig(eos_token_id=[2, 40], pad_token_id=0, no_repeat_ngram_size=1)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 128
    engine = HFEngine(model, tokenizer, fingerprint="", batch_tokens=130)
    assert not joins(model)
    answers = engine.generate(REQUESTS)
    assert model.generation_config.no_repeat_ngram_size == 1
    model.generation_config = hf.GenerationConfig(eos_token_id=[2, 40], pad_token_id=0)
    for request, answer in zip(REQUESTS, answers, strict=True):
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([request.prompt]),
                do_sample=False,
                repetition_penalty=1.2,
                max_new_tokens=request.max_new_tokens,
            )[0, len(request.prompt) :].tolist()
        assert answer.tokens == len(ids)
        assert answer.text == engine.decode([token for token in ids if token not in (2, 40)])
    seeded = GenerateRequest([5, 6], max_new_tokens=12, temperature=1.5, seed=4, stop=("w1",))
    assert engine.generate([seeded, *REQUESTS])[0] == engine.generate([seeded])[0]
