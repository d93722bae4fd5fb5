"""Against llama.cpp itself (`pip install -e '.[llamacpp]'`): a bundle's experts answer there as they do here."""

from __future__ import annotations

import importlib.util
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import httpx2
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from polymerge import Bundle, merge
from polymerge.engine import GenerateRequest, ScoreRequest
from polymerge.engine.answer import Collector
from polymerge.engine.llamacpp.engine import llama_engine
from polymerge.engine.llamacpp.server import llama_server
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.streaming import StreamRequest
from polymerge.engine.structure import Structure, choice_structure, json_structure
from polymerge.errors import ModelError
from polymerge.export import export_gguf
from polymerge.export.gguf.adapters import write_lora
from polymerge.export.gguf.converter import LlamaCpp
from polymerge.export.gguf.names import Architecture
from polymerge.export.vllm.prompts import CalibrationPrompt
from polymerge.serve.app import create_app
from tests.serve.conftest import running
from tests.tiny import COMMON, letters_tokenizer, make_experts, text_tokenizer

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="the extra `llamacpp` is not installed"),
]
SAMPLES = [CalibrationPrompt("abc de", answer="fgh")]
PROMPTS = [f"{first}{second} {third}" for first in "abc" for second in "defg" for third in "hijkl"]


def bundle_of(architecture: str, folder: Path, context: int | None = None) -> Bundle:
    experts = make_experts(architecture, folder, spread=0.05)
    for path in experts.values():
        if context is not None:
            config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": context}
            (path / "config.json").write_text(json.dumps(config))
        letters_tokenizer().save_pretrained(path)
    sources = {name: str(path) for name, path in experts.items()}
    recipe = {"experts": sources, "compress_rate": 0.5, "norms": "average"}
    return merge(recipe, folder / "bundle")


def test_characters_of_several_tokens_are_whole_and_scored(tmp_path: Path) -> None:
    """llama.cpp streams whole characters and tells nothing of the tokens that begin them: an answer that was cut inside
    one was broken off, one with a smile in it lost it, and choices in Chinese had no score."""
    config = LlamaConfig(**COMMON | {"vocab_size": 260, "max_position_embeddings": 256})
    experts = make_experts("llama", tmp_path, spread=0.05, count=2, config=config)
    for path in experts.values():
        text_tokenizer([("a", "b")]).save_pretrained(path)
    sources = {name: str(path) for name, path in experts.items()}
    bundle = merge({"experts": sources, "norms": "average"}, tmp_path / "bundle")
    folder = export_gguf(bundle, tmp_path / "out", type="f32", calibration=SAMPLES, device="cpu").folder
    embedded = HFEngine.from_bundle(bundle, device="cpu")
    smile = choice_structure(["é😀 ab"])
    # drawn tokens split characters as no tokenizer would
    odd = [GenerateRequest("ab", "e0", max_new_tokens=24, temperature=3.0, seed=seed,
           structure=Structure("grammar", 'root ::= "é日本語😀"+')) for seed in range(4)]  # fmt: skip
    asked = [GenerateRequest("ab c", "e0", max_new_tokens=n, structure=smile) for n in (1, 2, 3, 5, 6, 30)]
    scores = [ScoreRequest("ab", text, "e0") for text in ("x", "é", "😀", "漢字")]
    with llama_engine(folder, rows=2, cache_tokens=512, probe=False) as engine:
        answers, known = engine.generate(asked), embedded.generate(asked)
        drawn = engine.generate(odd)
        pairs = list(zip(engine.loglikelihood(scores), embedded.loglikelihood(scores), strict=True))
    assert [(a.text, a.tokens, a.finish) for a in answers[:-1]] == [(b.text, b.tokens, b.finish) for b in known[:-1]]
    assert answers[-1].text == "é😀 ab" and answers[-1].finish == "stop"
    assert all(abs(a.log_likelihood - b.log_likelihood) < 0.05 for a, b in pairs)
    whole = "é日本語😀" * 12
    assert [a.text for a in drawn if not whole.startswith(a.text.rstrip("\ufffd"))] == []
    assert {a.tokens for a in drawn if a.finish == "length"} == {24}
    # log-probabilities of such tokens are asked for when the answer's own place is free
    scored: list[Any] = []
    collector = Collector()
    with llama_engine(folder, rows=1, cache_tokens=64, probe=False) as engine:
        engine.submit([StreamRequest(asked[-1], logprobs=1)], [lambda piece: (scored.append(piece), collector(piece))])
        answer = collector.result(4)
    assert answer.text == "é😀 ab" and sum(len(piece.scores) for piece in scored) == answer.tokens


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen3"])
def test_greedy_answers_and_scores_are_the_embedded_engines(architecture: str, tmp_path: Path) -> None:
    """Embeddings and heads of the experts' own, ratios, rows in another order: all of it is in the files."""
    bundle = bundle_of(architecture, tmp_path)
    folder = export_gguf(bundle, tmp_path / "out", type="f32", calibration=SAMPLES, device="cpu").folder
    embedded = HFEngine.from_bundle(bundle, device="cpu")
    requests = [GenerateRequest(prompt, expert, max_new_tokens=4) for expert in (*bundle.experts, None)
                for prompt in PROMPTS[:15]]  # fmt: skip
    scores = [ScoreRequest(prompt, " ab", expert) for expert in bundle.experts for prompt in PROMPTS[:3]]
    with llama_engine(folder, rows=4, cache_tokens=512) as engine:
        same = [a.text == b.text for a, b in zip(engine.generate(requests), embedded.generate(requests), strict=True)]
        pairs = list(zip(engine.loglikelihood(scores), embedded.loglikelihood(scores), strict=True))
    assert sum(same) >= 0.9 * len(same)  # random models: some tokens are as likely as others
    assert all(abs(a.log_likelihood - b.log_likelihood) < 0.05 for a, b in pairs)


def test_an_export_says_what_llama_cpp_answers_and_another_bundles_files_are_refused(tmp_path: Path) -> None:
    bundle = bundle_of("llama", tmp_path)
    note = export_gguf(bundle, tmp_path / "out", type="f16", calibration=SAMPLES, device="cpu").note
    assert note.measured_with and all(e.served and e.served.kl < 1e-3 < e.kl_average for e in note.experts.values())
    other = tmp_path / "out" / note.experts["e1"].adapter
    other.write_bytes((tmp_path / "out" / note.experts["e0"].adapter).read_bytes())
    with pytest.raises(ModelError, match=r"expert .e1. is .* from the exported one"), llama_engine(tmp_path / "out"):
        pass
    other.write_bytes(b"\0" * other.stat().st_size)
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load it"), llama_engine(tmp_path / "out"):
        pass


def test_a_server_that_runs_already_is_used_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of("llama", tmp_path)
    folder = export_gguf(bundle, tmp_path / "out", type="f16", calibration=SAMPLES, device="cpu").folder
    asked = [GenerateRequest("ab", "e0", max_new_tokens=4)]
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    with llama_server(folder, rows=2, cache_tokens=512) as runs:
        with pytest.raises(ModelError, match=r"401.*LLAMA_API_KEY"), llama_engine(folder, url=runs.url):
            pass
        monkeypatch.setenv("LLAMA_API_KEY", runs.headers["Authorization"].removeprefix("Bearer "))
        with llama_engine(folder, url=runs.url) as engine:
            answers = engine.generate(asked)
    with llama_engine(folder, rows=2, cache_tokens=512) as engine:
        assert [a.text for a in answers] == [a.text for a in engine.generate(asked)]


def test_seeds_and_stop_texts(tmp_path: Path) -> None:
    bundle = bundle_of("llama", tmp_path)
    folder = export_gguf(bundle, tmp_path / "out", type="f16", calibration=SAMPLES, device="cpu").folder
    drawn = GenerateRequest("ab", "e0", max_new_tokens=12, temperature=1.0, seed=7)
    with llama_engine(folder, rows=4, cache_tokens=512) as engine:
        one, two = engine.generate([drawn, drawn])
        assert one == two
        whole = engine.generate([GenerateRequest("ab", "e1", max_new_tokens=12)])[0].text
        cut = engine.generate([GenerateRequest("ab", "e1", max_new_tokens=12, stop=(whole[3:5],))])[0]
        assert cut.text == whole[: whole.index(whole[3:5])] and cut.finish == "stop"


def test_answers_have_their_form(tmp_path: Path) -> None:
    folder = export_gguf(
        bundle_of("llama", tmp_path), tmp_path / "out", type="f16", calibration=SAMPLES, device="cpu"
    ).folder

    def asked(structure: Structure) -> GenerateRequest:
        return GenerateRequest("ab", "e0", max_new_tokens=12, temperature=1.0, structure=structure)

    choices, boolean = choice_structure(["cd", "fed"]), json_structure({"type": "boolean"})
    with llama_engine(folder, rows=4, cache_tokens=512) as engine:
        answers = engine.generate(
            [asked(form) for form in (choices, boolean, Structure("grammar", 'root ::= "a" "b"'))]
        )
        assert answers[0].text in ("cd", "fed") and answers[1].text in ("true", "false") and answers[2].text == "ab"
        assert {answer.finish for answer in answers} == {"stop"}
        for form in (Structure("regex", "a+", "guided_regex"), Structure("grammar", "start: /a/", "guided_grammar")):
            with pytest.raises(ModelError, match=form.name):
                engine.generate([asked(form)])


def test_a_tool_that_must_be_called_is(tmp_path: Path) -> None:
    """Behind the server, whatever is drawn: a random model cannot write white space up to its budget."""
    bundle = bundle_of("llama", tmp_path, context=2048)
    folder = export_gguf(bundle, tmp_path / "out", type="f16", calibration=SAMPLES, device="cpu").folder
    form = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"]}
    tools = [{"type": "function", "function": {"name": "pay", "parameters": form | {"additionalProperties": False}}}]
    turn = {"model": "e1", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 80, "tools": tools}
    with llama_engine(folder, rows=2, cache_tokens=4096) as engine, running(create_app(engine), engine) as served:
        choices: list[Any] = ["required", {"type": "function", "function": {"name": "pay"}}]
        for choice, seed in product(choices, range(4)):
            asked = turn | {"tool_choice": choice, "seed": seed}
            answer = httpx2.post(f"{served.url}/v1/chat/completions", json=asked, timeout=60).json()["choices"][0]
            [call] = answer["message"]["tool_calls"]
            assert call["function"]["name"] == "pay"

            assert call["function"]["arguments"] in ('{"sum": 1}', '{"sum": 2}')
        free = httpx2.post(f"{served.url}/v1/chat/completions", json=turn, timeout=60)
        assert free.status_code == 200, free.text


def test_the_converters_adapter_is_ours(tmp_path: Path) -> None:
    """POLYMERGE_LLAMA_CPP names a folder of llama.cpp's sources: names and the order of rows are its converter's."""
    place = os.environ.get("POLYMERGE_LLAMA_CPP")
    if not place:
        pytest.skip("POLYMERGE_LLAMA_CPP is not set")
    base = make_experts("llama", tmp_path, count=1)["e0"]
    letters_tokenizer().save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    model.save_pretrained(tmp_path / "peft")
    write_lora(tmp_path / "peft", Architecture("llama", 2, 4, 2), tmp_path / "ours.gguf", "f32")
    LlamaCpp(Path(place)).adapter(tmp_path / "peft", base, tmp_path / "theirs.gguf", "f32")
    one, two = ({t.name: t for t in gguf.GGUFReader(tmp_path / f).tensors} for f in ("ours.gguf", "theirs.gguf"))
    assert set(one) == set(two) and all(np.array_equal(one[name].data, two[name].data) for name in one)
