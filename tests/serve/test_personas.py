"""Two chat fine-tunes in one bundle answer as each of them does alone: served, generated, evaluated, exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from fastapi.testclient import TestClient

from polymerge import Bundle, export_dense, export_peft, generate, merge
from polymerge.bundle.inspect import inspect_bundle
from polymerge.engine.base import GenerateRequest, ScoreRequest
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.errors import ModelError
from polymerge.export import plan_vllm
from polymerge.router.route import Route
from polymerge.serve.app import create_app
from tests.fine_tunes import ROOM, TEXT, Original, fine_tunes

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("plain", "chatml")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    return fine_tunes(tmp_path_factory.mktemp("fine-tunes"))


@pytest.fixture(scope="module")
def bundle(originals: dict[str, Original], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    sources = {name: str(original.path) for name, original in originals.items()}
    return merge(
        {"experts": sources, "code": "factors", "compress_rate": 0.0}, tmp_path_factory.mktemp("bundles") / "bundle"
    )


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> HFEngine:
    return HFEngine.from_bundle(bundle, device="cpu")


@pytest.fixture(scope="module")
def batching(bundle: Bundle) -> Iterator[BatchingEngine]:
    made = BatchingEngine(HFEngine.from_bundle(bundle, device="cpu"))
    yield made
    made.close(0)


class ByWord:
    """Reads the text itself; a rendered template would not be these words."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def route(self, texts: Any) -> list[Route]:
        self.texts += texts
        return [Route("chatml", "x", 1.0, {"x": 1.0}) for _ in texts]


def test_the_originals_differ_in_all_that_is_compared(originals: dict[str, Original]) -> None:
    plain, chatml = (originals[name] for name in NAMES)
    assert plain.prompt() != chatml.prompt() and plain.answer() != chatml.answer()
    for one, other in ((plain, chatml), (chatml, plain)):
        end, ends = one.ids()[-1], other.model.generation_config.eos_token_id
        assert len(one.ids()) < ROOM and end in one.model.generation_config.eos_token_id and end not in ends


def test_the_bundle_says_who_has_what(bundle: Bundle) -> None:
    personas = {expert.name: expert.persona for expert in inspect_bundle(bundle).experts}
    assert personas == {"plain": (), "chatml": ("tokenizer", "template", "generation")}
    assert bundle.manifest.format_version == 3
    assert any("the average has what 'plain' has" in note for note in bundle.manifest.notes)
    opened = hf.AutoTokenizer.from_pretrained(bundle.path / "experts/chatml/persona")
    assert opened.eos_token == "<|im_end|>" and "<|im_start|>" in opened.chat_template


@pytest.mark.parametrize("name", NAMES)
def test_generate_answers_as_the_original(bundle: Bundle, originals: dict[str, Original], name: str) -> None:
    response = generate(bundle.path, TEXT, expert=name, max_new_tokens=ROOM, device="cpu")
    assert response.text == originals[name].answer() and response.tokens == len(originals[name].ids())
    assert response.prompt_tokens == len(originals[name].prompt())


@pytest.mark.parametrize("streamed", [False, True])
def test_served_answers_are_each_original_s(
    batching: BatchingEngine, originals: dict[str, Original], streamed: bool
) -> None:
    with TestClient(create_app(batching, None, None)) as client:
        for name in NAMES:
            body = {"model": name, "messages": [{"role": "user", "content": TEXT}], "temperature": 0}
            if streamed:
                chunks = client.post("/v1/chat/completions", json=body | {"stream": True}).text
                text = "".join(_contents(chunks))
            else:
                answer = client.post("/v1/chat/completions", json=body | {"max_tokens": ROOM}).json()
                text = answer["choices"][0]["message"]["content"]
                assert answer["choices"][0]["finish_reason"] == "stop"
                usage = {"prompt": len(originals[name].prompt()), "completion": len(originals[name].ids())}
                assert {key: answer["usage"][f"{key}_tokens"] for key in usage} == usage
            assert text == originals[name].answer()
            plain = client.post("/v1/completions", json={"model": name, "prompt": "<|im_end|> w95 w9", "max_tokens": 1})
            ids = originals[name].tokenizer("<|im_end|> w95 w9")["input_ids"]
            assert plain.json()["usage"]["prompt_tokens"] == len(ids)


def _contents(stream: str) -> Iterator[str]:
    import json

    for line in stream.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                yield choice["delta"].get("content") or ""


def test_the_router_reads_the_text_and_its_choice_the_template(
    batching: BatchingEngine, originals: dict[str, Original]
) -> None:
    router = ByWord()
    with TestClient(create_app(batching, router, None)) as client:
        body = {"model": "auto", "messages": [{"role": "user", "content": TEXT}], "temperature": 0, "max_tokens": ROOM}
        answer = client.post("/v1/chat/completions", json=body).json()
    assert router.texts == [TEXT] and answer["polymerge"]["expert"] == "chatml"
    assert answer["choices"][0]["message"]["content"] == originals["chatml"].answer()


def test_one_batch_encodes_stops_and_decodes_by_each_expert(engine: HFEngine, originals: dict[str, Original]) -> None:
    requests, expected = [], []
    for name in (*NAMES, *NAMES):
        messages = [{"role": "user", "content": TEXT}]
        assert engine.chat_prompt(messages, expert=name) == originals[name].prompt()
        requests.append(GenerateRequest(engine.chat_prompt(messages, expert=name), name, ROOM))
        expected.append(originals[name].answer())
    assert [generation.text for generation in engine.generate(requests)] == expected
    text = "w94 <|im_end|> w95"
    for name in NAMES:
        ids = originals[name].tokenizer(text)["input_ids"]
        assert engine.encode(text, expert=name) == ids
        assert engine.decode(ids, expert=name) == originals[name].tokenizer.decode(ids, skip_special_tokens=True)
    assert engine.encode(text) == engine.encode(text, expert="plain") != engine.encode(text, expert="chatml")


def test_scores_are_those_of_the_expert_s_tokens(engine: HFEngine, originals: dict[str, Original]) -> None:
    context, continuation = "w20 <|im_end|> w21", "<|im_start|> w22"
    for name in NAMES:
        tokenizer = originals[name].tokenizer
        before, after = tokenizer(context)["input_ids"], tokenizer(continuation, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = originals[name].model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
        wanted = sum(float(logits[len(before) + n - 1, token]) for n, token in enumerate(after))
        [score] = engine.loglikelihood([ScoreRequest(context, continuation, name)])
        assert score.log_likelihood == pytest.approx(wanted, abs=1e-3)


def test_a_mixture_of_other_tokenizers_is_refused(engine: HFEngine) -> None:
    with pytest.raises(ModelError, match="'plain' and 'chatml': their tokenizers differ"):
        engine.generate([GenerateRequest("w5", {"plain": 0.5, "chatml": 0.5})])


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_export_is_the_original_whole(
    bundle: Bundle, originals: dict[str, Original], tmp_path: Path, name: str
) -> None:
    exported = Original(export_dense(bundle, name, tmp_path / name))
    assert exported.prompt() == originals[name].prompt()
    assert exported.ids() == originals[name].ids() and exported.answer() == originals[name].answer()
    assert exported.model.generation_config.eos_token_id == originals[name].model.generation_config.eos_token_id
    assert exported.tokenizer.get_vocab() == originals[name].tokenizer.get_vocab()


@pytest.mark.parametrize("name", NAMES)
def test_a_peft_export_has_its_words_beside_it(originals: dict[str, Original], tmp_path: Path, name: str) -> None:
    sources = {name: str(original.path) for name, original in originals.items()}
    lossy = merge({"experts": sources, "code": "factors", "compress_rate": 0.6}, tmp_path / "bundle")
    folder = export_peft(lossy, name, tmp_path / name).folder
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == originals[name].tokenizer.chat_template
    assert tokenizer.get_vocab() == originals[name].tokenizer.get_vocab()
    settings = hf.GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == originals[name].model.generation_config.eos_token_id


def test_vllm_refuses_what_it_has_once_by_the_expert_s_name(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'chatml' has its own tokenizer, and vLLM has one for all"):
        plan_vllm(bundle)
    alike = fine_tunes(tmp_path, tokenizers=False)
    sources = {name: str(original.path) for name, original in alike.items()}
    with pytest.raises(ModelError, match="'chatml' has its own end tokens"):
        plan_vllm(merge({"experts": sources, "code": "factors", "compress_rate": 0.6}, tmp_path / "bundle"))
