"""The embedded engine against transformers called by hand, on tiny models whose requests all have their own expert."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from polymerge import export_dense, load_model
from polymerge.engine import GenerateRequest, ScoreRequest
from polymerge.engine.local.engine import HFEngine, _backing_off
from polymerge.errors import ModelError
from polymerge.recipe.source import Source
from tests.conftest import Merged
from tests.tiny import tiny_tokenizer

ARCHITECTURES = ["llama", "gemma3", "gpt2", "gpt-neox", "mixtral"]
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15], [16], [3, 4, 5, 6]]
ROWS = ["e0", "e1", None, "e2", {"e0": 0.5, "e1": 0.5}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def engine(merged: Merged, tokenizer: Any, request: pytest.FixtureRequest) -> HFEngine:
    bundle, _ = merged(request.param)
    return HFEngine(load_model(bundle), tokenizer, fingerprint=bundle.digest, batch_tokens=64)


def logits_alone(engine: HFEngine, ids: list[int], expert: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = engine.model(torch.tensor([ids]), experts=[expert], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("engine", ARCHITECTURES, indirect=True)
def test_loglikelihood_is_the_sum_of_a_plain_forward_pass(engine: HFEngine) -> None:
    """Choices that share a context, continuations of several lengths, mixed experts, many batches."""
    requests = [
        ScoreRequest(prompt, continuation, expert)
        for prompt, expert in zip(PROMPTS, ROWS, strict=True)
        for continuation in ([20], [21, 22, 23], [24, 25])
    ]
    for request, score in zip(requests, engine.loglikelihood(requests), strict=True):
        ids = [*request.context, *request.continuation]
        logits = logits_alone(engine, ids, request.expert).log_softmax(-1)
        start = len(request.context)
        expected = sum(float(logits[start + n - 1, token]) for n, token in enumerate(request.continuation))
        greedy = all(int(logits[start + n - 1].argmax()) == token for n, token in enumerate(request.continuation))
        assert score.log_likelihood == pytest.approx(expected, abs=2e-3)
        assert (score.is_greedy, score.tokens) == (greedy, len(request.continuation))


@pytest.mark.parametrize("engine", ARCHITECTURES, indirect=True)
def test_greedy_answers_of_a_mixed_batch_are_those_of_every_row_alone(engine: HFEngine) -> None:
    requests = [GenerateRequest(p, e, max_new_tokens=4 + n) for n, (p, e) in enumerate(zip(PROMPTS, ROWS, strict=True))]
    together = engine.generate(requests)
    assert together == [engine.generate([request])[0] for request in requests]
    for request, answer in zip(requests, together, strict=True):
        assert answer.prompt_tokens == len(request.prompt)
        assert answer.tokens == request.max_new_tokens or answer.finish == "stop"


@pytest.mark.parametrize("engine", ["llama"], indirect=True)
def test_an_exported_expert_scores_the_same_alone(engine: HFEngine, tokenizer: Any, tmp_path: Path) -> None:
    folder = export_dense(engine.model.bundle, "e1", tmp_path / "dense")
    dense = HFEngine(AutoModelForCausalLM.from_pretrained(folder), tokenizer, fingerprint="dense")
    for prompt in PROMPTS:
        mixed = engine.loglikelihood([ScoreRequest(prompt, [20, 21], "e1")])[0]
        assert dense.loglikelihood([ScoreRequest(prompt, [20, 21])])[0].log_likelihood == pytest.approx(
            mixed.log_likelihood, abs=2e-3
        )


@pytest.mark.parametrize("engine", ["llama", "gemma3", "gpt2"], indirect=True)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_do_not_depend_on_the_batch_and_are_the_averages(engine: HFEngine, pooling: Any) -> None:
    embeddings = engine.embed(PROMPTS, layers=(0, -1), pooling=pooling)
    assert embeddings.shape == (len(PROMPTS), 2, 48) and embeddings.dtype == np.float32
    for row, prompt in zip(embeddings, PROMPTS, strict=True):
        with torch.no_grad():
            states = engine.model.hf.base_model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for vector, layer in zip(row, (states[0], states[-1]), strict=True):
            expected = layer[0, -1] if pooling == "last" else layer[0].mean(0)
            assert np.allclose(vector, expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("engine", ["llama"], indirect=True)
def test_an_answer_ends_at_its_own_stop_text_and_budget(engine: HFEngine) -> None:
    whole = engine.generate([GenerateRequest([5, 6, 7], "e0", max_new_tokens=8)])[0]
    word = whole.text.split()[2]
    cut, free = engine.generate(
        [
            GenerateRequest([5, 6, 7], "e0", max_new_tokens=8, stop=(word,)),
            GenerateRequest([5, 6, 7], "e0", max_new_tokens=8),
        ]
    )
    assert cut.text == whole.text[: whole.text.index(word)] and cut.finish == "stop"
    assert free == whole


@pytest.mark.parametrize("engine", ["llama"], indirect=True)
def test_the_same_seed_samples_the_same_answer(engine: HFEngine) -> None:
    request = GenerateRequest([5, 6], "e0", max_new_tokens=12, temperature=2.0, top_p=0.9, seed=7)
    first, again = (engine.generate([request])[0].text for _ in range(2))
    other = engine.generate([GenerateRequest([5, 6], "e0", max_new_tokens=12, temperature=2.0, seed=8)])[0].text
    assert first == again != other


@pytest.mark.parametrize("engine", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate([GenerateRequest([5], "e9")]), "no expert 'e9'"),
        (lambda e: e.generate([GenerateRequest(list(range(3, 90)) * 2, "e0")]), "context 128"),
        (lambda e: e.generate([GenerateRequest([], "e0")]), "empty"),
        (lambda e: e.loglikelihood([ScoreRequest([5], [])]), "continuation is empty"),
        (lambda e: e.loglikelihood([ScoreRequest([5], [6], "e9")]), "no expert 'e9'"),
        (lambda e: e.embed([[]]), "0 tokens"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_line(
    engine: HFEngine, call: Callable[[HFEngine], object], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        call(engine)
    assert len(str(raised.value).splitlines()) == 1


def test_a_batch_that_runs_out_of_memory_runs_as_halves() -> None:
    tried = []

    def run(items: Any) -> list[int]:
        tried.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError
        return [item * 10 for item in items]

    assert _backing_off([1, 2, 3, 4, 5], run) == [10, 20, 30, 40, 50]
    assert tried[0] == 5 and max(tried[1:]) < 5

    def never(items: Any) -> list[int]:
        raise torch.OutOfMemoryError

    with pytest.raises(ModelError, match="out of memory on one request"):
        _backing_off([1], never)


def test_an_adapter_as_a_plain_model_is_what_peft_makes_of_it(
    checkpoints: Callable[[str], dict[str, Path]], tokenizer: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(checkpoints("llama")["e0"])
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    engine = HFEngine.from_checkpoint(Source(source=str(tmp_path / "adapter"), base=str(tmp_path / "base")))
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
    score = engine.loglikelihood([ScoreRequest([5, 6, 7], [20])])[0]
    assert score.log_likelihood == pytest.approx(float(expected[20]), abs=1e-3)
