"""Two real chat fine-tunes of SmolLM2-135M in one bundle, each with its own tokens, template and end: what is served,
generated and exported is what transformers makes of each original with its own tokenizer and template.

Trained on first use (some minutes on two cores), and kept in the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from fastapi.testclient import TestClient

from polymerge import Bundle, export_dense, export_peft, generate, merge, remove_expert, verify
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.errors import ModelError
from polymerge.export import plan_vllm, write_vllm
from polymerge.export.vllm.prompts import CalibrationPrompt
from polymerge.serve.app import create_app
from polymerge.serve.probe import probe
from tests.chats import BEGIN, CHATS, END, skill_of, two_chats
from tests.fine_tunes import ROOM, Original

pytestmark = pytest.mark.slow
WORDS = 49152  # of SmolLM2's tokenizer


@pytest.fixture(scope="module")
def originals() -> dict[str, Original]:
    return two_chats()


@pytest.fixture(scope="module")
def bundle(originals: dict[str, Original], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    sources = {name: str(original.path) for name, original in originals.items()}
    return merge({"experts": sources, "compress_rate": 0.0}, tmp_path_factory.mktemp("two") / "bundle")


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> HFEngine:
    return HFEngine.from_bundle(bundle, device="cpu")


def requests() -> list[tuple[str, str]]:
    """(expert, what it is asked): of its own skill, and of the other's."""
    texts = [skill_of(name).test[0].prompt for name in CHATS]
    return [(name, text) for text in texts for name in CHATS]


def body(name: str, text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": name, "messages": messages, "temperature": 0, "max_tokens": ROOM, **more}


def test_the_originals_have_each_their_own(originals: dict[str, Original], bundle: Bundle) -> None:
    chatml, plain = originals["chatml"], originals["plain"]
    assert len(chatml.model.get_input_embeddings().weight) == WORDS + 2
    assert len(plain.model.get_input_embeddings().weight) == WORDS
    ends = {name: skill_of(name).test[0].prompt for name in CHATS}
    assert chatml.tokenizer.decode(chatml.ids(ends["chatml"])[-1]) == END
    assert plain.tokenizer.decode(plain.ids(ends["plain"])[-1]) == "<|endoftext|>"
    assert chatml.tokenizer.decode(chatml.prompt("x")[-1]) == BEGIN and chatml.prompt("x") != plain.prompt("x")
    assert bundle.manifest.format_version == 4
    assert (bundle.vocabulary("chatml"), bundle.vocabulary("plain")) == (None, WORDS)
    assert verify(bundle, sources=True).ok


def test_served_answers_are_each_original_s(engine: HFEngine, bundle: Bundle, originals: dict[str, Original]) -> None:
    probe(engine, bundle)
    batching = BatchingEngine(engine)
    try:
        with TestClient(create_app(batching, None, None)) as client:
            for name, text in requests():
                found = client.post("/v1/chat/completions", json=body(name, text)).json()
                ids, prompt = originals[name].ids(text), originals[name].prompt(text)
                assert found["choices"][0]["message"]["content"] == originals[name].answer(text)
                usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
                assert usage.items() <= found["usage"].items()
                ended = ids[-1] == originals[name].tokenizer.eos_token_id
                assert found["choices"][0]["finish_reason"] == ("stop" if ended else "length")
            unknown = client.post("/v1/completions", json={"model": "plain", "prompt": [5, WORDS], "max_tokens": 1})
            assert unknown.status_code == 400 and f"token {WORDS}" in unknown.text
    finally:
        batching.close(0)


@pytest.mark.parametrize("name", CHATS)
def test_generate_answers_as_the_original(bundle: Bundle, originals: dict[str, Original], name: str) -> None:
    text = skill_of(name).test[1].prompt
    response = generate(bundle.path, text, expert=name, max_new_tokens=ROOM, device="cpu")
    assert response.text == originals[name].answer(text) and response.tokens == len(originals[name].ids(text))


@pytest.mark.parametrize("name", CHATS)
def test_a_dense_export_is_the_original_whole(
    bundle: Bundle, originals: dict[str, Original], tmp_path: Path, name: str
) -> None:
    original, exported = originals[name], Original(export_dense(bundle, name, tmp_path / name))
    assert exported.tokenizer.get_vocab() == original.tokenizer.get_vocab()
    assert exported.tokenizer.chat_template == original.tokenizer.chat_template
    ours, theirs = exported.model.state_dict(), original.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    text = skill_of(name).test[2].prompt
    assert (exported.prompt(text), exported.ids(text)) == (original.prompt(text), original.ids(text))


def test_plain_peft_answers_as_the_one_that_it_can_hold(
    bundle: Bundle, originals: dict[str, Original], tmp_path: Path
) -> None:
    folder = export_peft(bundle, "chatml", tmp_path / "chatml").folder
    base = hf.AutoModelForCausalLM.from_pretrained(bundle.path)
    base.generation_config = hf.GenerationConfig.from_pretrained(folder)
    exported = Original(folder)
    exported.__dict__["model"] = peft.PeftModel.from_pretrained(base, folder).eval()
    for example in skill_of("chatml").test[:2]:
        assert exported.ids(example.prompt) == originals["chatml"].ids(example.prompt)
        assert exported.answer(example.prompt) == originals["chatml"].answer(example.prompt)
    words = rf"expert 'plain': its vocabulary has {WORDS} tokens, and the average, .* {WORDS + 2}"
    with pytest.raises(ModelError, match=words):
        export_peft(bundle, "plain", tmp_path / "plain")


def test_a_folder_for_vllm_has_one_tokenizer_and_refuses_the_other(
    originals: dict[str, Original], tmp_path: Path
) -> None:
    sources = {name: str(original.path) for name, original in originals.items()}
    bundle = merge({"experts": sources, "compress_rate": 0.9, "embeddings": "average"}, tmp_path / "bundle")
    with pytest.raises(ModelError, match="'plain' has its own tokenizer, and vLLM has one for all"):
        plan_vllm(bundle)
    alone = remove_expert(bundle, "plain")
    samples = [CalibrationPrompt(e.prompt, e.answer) for e in skill_of("chatml").test[:2]]
    folder = write_vllm(plan_vllm(alone, max_rank=8), tmp_path / "vllm", samples=samples, device="cpu").folder
    original = originals["chatml"]
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == original.tokenizer.get_vocab() and tokenizer.eos_token == END
    assert tokenizer.chat_template == original.tokenizer.chat_template
    assert hf.GenerationConfig.from_pretrained(folder).eos_token_id == original.tokenizer.eos_token_id
    assert hf.AutoConfig.from_pretrained(folder).vocab_size == WORDS + 2
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"model.safetensors", "adapters/chatml/adapter_config.json"} <= files and not any(
        "plain" in f for f in files
    )
