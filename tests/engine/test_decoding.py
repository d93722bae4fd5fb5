"""One hostile checkpoint through every engine: the same answer offline and served, alone and in a batch.

Its generation_config.json says all that it can; docs/decoding.md says what of it counts. The oracle is transformers'
`generate`, which is told of the repetition penalty and the end tokens, and of nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from polymerge.engine import GenerateRequest, Generation
from polymerge.engine.defaults import GenerationDefaults
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.vllm.api import VllmApi
from polymerge.engine.vllm.engine import VllmEngine
from polymerge.engine.vllm.folder import NOTE
from polymerge.errors import ModelError
from tests.engine.vllm.fake import fake_vllm
from tests.engine.vllm.test_engine import folder as exported
from tests.tiny import byte_tokenizer, tiny_tokenizer

__all__ = ["exported"]

HOSTILE: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.02,
    "repetition_penalty": 1.3,
    "max_new_tokens": 3,
    "eos_token_id": [2, 40, 41],
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(50, 90)),
    "begin_suppress_tokens": list(range(3, 50)),
    "bad_words_ids": [[n] for n in range(20, 30)],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 8,
    "min_length": 30,
    "num_beams": 3,
    "max_length": 5,
}
COUNTS = GenerationDefaults(0.7, 0.9, 5, 0.02, 1.3, 3, frozenset({2, 40, 41}))
PROMPT = [5, 6, 7, 6, 5]
LONG = GenerateRequest(list(range(3, 93)) + [9] * 10, max_new_tokens=28)  # fills the context of 128
NEIGHBOURS = [
    LONG,
    GenerateRequest([9], max_new_tokens=1),
    GenerateRequest([30, 31], max_new_tokens=60, temperature=1.5, repetition_penalty=1.0),
    GenerateRequest([8] * 20, max_new_tokens=17, temperature=0.9, seed=3, stop=("w3",)),
    GenerateRequest([60, 61, 62], max_new_tokens=33, repetition_penalty=2.0),
]


def written(folder: Path, checkpoint: Path, tokenizer: Any, settings: dict[str, Any] = HOSTILE) -> Path:
    shutil.copytree(checkpoint, folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def hostile(checkpoints: Callable[[str], dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("hostile") / "m", checkpoints("llama")["e0"], tiny_tokenizer())


@pytest.fixture(scope="module")
def offline(hostile: Path) -> HFEngine:
    """Its batches hold three rows or so, so that rows come and go."""
    return HFEngine.from_checkpoint(str(hostile), batch_tokens=400)


@pytest.fixture(scope="module")
def served(hostile: Path) -> Iterator[BatchingEngine]:
    engine = BatchingEngine(HFEngine.from_checkpoint(str(hostile)))
    yield engine
    engine.close(0)


def oracle(folder: Path, prompt: list[int], tokens: int, *, penalty: float = 1.3) -> list[int]:
    """The greedy answer's token ids, the end token among them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config = GenerationConfig(eos_token_id=[2, 40, 41], pad_token_id=0)
    options = {"do_sample": False, "repetition_penalty": penalty, "max_new_tokens": tokens}
    with torch.no_grad():
        ids: list[int] = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    return ids


def everywhere(offline: HFEngine, served: BatchingEngine, request: GenerateRequest) -> dict[str, Generation]:
    many = [*NEIGHBOURS, request, *reversed(NEIGHBOURS)]
    return {
        "offline alone": offline.generate([request])[0],
        "offline in a batch": offline.generate(many)[len(NEIGHBOURS)],
        "served alone": served.generate([request])[0],
        "served among others": served.generate(many)[len(NEIGHBOURS)],
    }


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids if token > 2)


def test_what_counts_is_read_and_the_rest_is_left_out(offline: HFEngine, served: BatchingEngine) -> None:
    assert offline.defaults_of() == served.defaults_of() == COUNTS


@pytest.mark.parametrize("prompt", [PROMPT, [9], [30, 31], [8] * 20])
def test_greedy_answers_are_transformers_with_the_penalty_alone(
    hostile: Path, offline: HFEngine, served: BatchingEngine, prompt: list[int]
) -> None:
    ids = oracle(hostile, prompt, 40)
    assert prompt != PROMPT or ids != oracle(hostile, prompt, 40, penalty=1.0)
    ended = ids[-1] in COUNTS.ends
    expected = Generation(words(ids[:-1] if ended else ids), len(prompt), len(ids), "stop" if ended else "length")
    answers = everywhere(offline, served, GenerateRequest(prompt, max_new_tokens=40))
    assert answers == dict.fromkeys(answers, expected)


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(PROMPT, max_new_tokens=40, repetition_penalty=1.0),
        GenerateRequest(PROMPT, max_new_tokens=40, temperature=0.7, seed=1),
        GenerateRequest(PROMPT, max_new_tokens=40, temperature=1.5, top_k=5, seed=2),
        GenerateRequest(PROMPT, max_new_tokens=40, temperature=1.5, min_p=0.3, seed=3, repetition_penalty=1.1),
        GenerateRequest(PROMPT, max_new_tokens=40, temperature=1.5, top_p=0.6, seed=4, stop=("w1", "w2")),
        LONG,
        GenerateRequest(PROMPT, max_new_tokens=0),
        GenerateRequest(PROMPT, max_new_tokens=1000, repetition_penalty=1.0),  # up to the end of the context
    ],
)
def test_an_answer_is_the_same_in_every_place(
    offline: HFEngine, served: BatchingEngine, request_: GenerateRequest
) -> None:
    answers = everywhere(offline, served, request_)
    assert len(set(answers.values())) == 1
    answer = answers["served alone"]
    assert answer.finish == "stop" or answer.tokens == min(request_.max_new_tokens, 128 - len(request_.prompt))


def test_seeds_differ_and_torch_fixes_what_has_none(offline: HFEngine) -> None:
    drawn = GenerateRequest(PROMPT, max_new_tokens=30, temperature=1.5)
    assert len({offline.generate([replace(drawn, seed=seed)])[0].text for seed in range(5)}) == 5
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append([answer.text for answer in offline.generate([drawn] * 3)])
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


@pytest.fixture(scope="module")
def special(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], int]:
    """The hostile checkpoint where a word that it writes is a special token; its answer, and the word's place in it."""
    ids = oracle(hostile, PROMPT, 40)
    place = next(
        n for n in range(3, len(ids) - 1) if ids[n - 1] > 2 and ids[n] > 2 and ids[n] not in [*PROMPT, *ids[:n]]
    )
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"w{ids[place]}"]})
    folder = tmp_path_factory.mktemp("special") / "m"
    shutil.copytree(hostile, folder)
    tokenizer.save_pretrained(folder)
    return folder, ids, place


def test_a_special_token_as_a_stop_text_is_seen_everywhere_and_shown_nowhere(
    special: tuple[Path, list[int], int],
) -> None:
    folder, ids, place = special
    offline, served = HFEngine.from_checkpoint(str(folder)), BatchingEngine(HFEngine.from_checkpoint(str(folder)))
    try:
        word = f"w{ids[place]}"
        for stop in ((word,), (f"{words(ids[place - 1 : place])[1:]} {word}",)):
            request = GenerateRequest(PROMPT, max_new_tokens=40, stop=stop)
            answers = everywhere(offline, served, request)
            assert len(set(answers.values())) == 1
            assert answers["served alone"].tokens == place + 1 and answers["served alone"].finish == "stop"
        assert answers["served alone"].text == words(ids[:place])[: -len(stop[0]) + len(word) + 1]
        unseen = offline.generate([GenerateRequest(PROMPT, max_new_tokens=40)])[0]
        assert word not in unseen.text.split() and unseen.tokens == len(ids)
    finally:
        served.close(0)


def test_stop_texts_of_several_tokens_and_bytes(checkpoints: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    """A model of bytes writes characters and halves of them."""
    folder = written(tmp_path / "m", checkpoints("llama")["e0"], byte_tokenizer(), {"repetition_penalty": 1.3})
    offline, served = HFEngine.from_checkpoint(str(folder)), BatchingEngine(HFEngine.from_checkpoint(str(folder)))
    try:
        drawn = GenerateRequest(PROMPT, max_new_tokens=60, temperature=3.0, seed=5)
        whole = offline.generate([drawn])[0].text
        assert "\ufffd" in whole and len(whole) > 20
        for place in range(3, len(whole) - 3, 5):
            stop = whole[place : place + 3]
            answers = everywhere(offline, served, replace(drawn, stop=(stop, "never")))
            assert len(set(answers.values())) == 1
            answer = answers["offline alone"]
            assert answer.text == whole[: whole.index(stop)] and answer.finish == "stop"
    finally:
        served.close(0)


def test_vllm_is_asked_for_the_same_and_its_answers_end_the_same(
    special: tuple[Path, list[int], int], exported: Path, tmp_path: Path
) -> None:
    """The server goes on with the model's answer as long as it is let."""
    folder, ids, place = special
    shutil.copytree(folder, tmp_path / "v", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copyfile(exported / NOTE, tmp_path / "v" / NOTE)
    asked: list[dict[str, Any]] = []

    def model(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        made = ids[: body["max_tokens"]]
        return {"token_ids": made, "finish_reason": "stop" if made[-1] in COUNTS.ends else "length"}

    offline = HFEngine.from_checkpoint(str(folder))
    requests = [
        GenerateRequest(PROMPT, max_new_tokens=40),
        GenerateRequest(PROMPT, max_new_tokens=40, stop=(f"w{ids[place]}",)),
        GenerateRequest(PROMPT, max_new_tokens=4),
        GenerateRequest(PROMPT, max_new_tokens=1000),
    ]
    with fake_vllm(["a", "b", "average"], model, max_model_len=128) as url:
        engine = VllmEngine(tmp_path / "v", VllmApi(url))
        assert engine.defaults_of() == COUNTS
        assert engine.generate(requests[:3]) == offline.generate(requests[:3])
        greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.3}
        for body in asked:
            assert {name: body[name] for name in greedy} == greedy
            assert not body.keys() & {"stop", "min_tokens", "bad_words", "logit_bias"}
        engine.generate([requests[3]])
        assert asked[-1]["max_tokens"] == 128 - len(PROMPT)
        drawn = replace(requests[0], temperature=0.9, top_p=0.8, top_k=4, min_p=0.1, repetition_penalty=1.0, seed=7)
        engine.generate([drawn])
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        assert [asked[-1][name] for name in names] == [0.9, 0.8, 4, 0.1, 1.0, 7]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("repetition_penalty", 0.0), ("repetition_penalty", -1.3), ("temperature", -0.5), ("top_p", 0.0), ("top_k", 2.5),
     ("max_new_tokens", 0)],
)  # fmt: skip
def test_a_setting_that_means_nothing_is_refused_in_one_line(offline: HFEngine, setting: str, value: float) -> None:
    model = offline.hf
    before = model.generation_config
    model.generation_config = GenerationConfig()
    setattr(model.generation_config, setting, value)
    try:
        with pytest.raises(ModelError, match=rf"generation_config.json: {setting} cannot be {value}"):
            HFEngine(model, offline.tokenizer, fingerprint="")
    finally:
        model.generation_config = before


def test_settings_that_say_nothing_are_neutral(checkpoints: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    settings = {"top_k": -1, "eos_token_id": 40}
    folder = written(tmp_path / "m", checkpoints("llama")["e0"], tiny_tokenizer(), settings)
    assert HFEngine.from_checkpoint(str(folder)).defaults_of() == GenerationDefaults(ends=frozenset({2, 40}))
