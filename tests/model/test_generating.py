"""`generate` on a loaded bundle: whose settings hold, and who may call it how."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from polymerge import load_model, merge
from polymerge.errors import ModelError
from polymerge.model.mixed import MixedModel
from tests.conftest import Merged
from tests.fine_tunes import ROOM, Original, fine_tunes

NAMES = ["plain", "chatml"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    return fine_tunes(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="module")
def model(originals: dict[str, Original], tmp_path_factory: pytest.TempPathFactory) -> MixedModel:
    return bundled(originals, tmp_path_factory.mktemp("bundle") / "b")


def bundled(originals: dict[str, Original], place: Path) -> MixedModel:
    return load_model(merge({name: str(one.path) for name, one in originals.items()}, place, compress_rate=0.0))


def together(originals: dict[str, Original], names: list[str]) -> dict[str, Any]:
    """Their prompts as one batch."""
    prompts = [originals[name].prompt() for name in names]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def new(output: Any, inputs: dict[str, Any], row: int, of: list[int]) -> list[int]:
    """What was made of a row, without what fills it up behind an answer as long as another one."""
    made: list[int] = output[row, inputs["input_ids"].shape[1] :].tolist()
    assert not any(made[len(of) :])
    return made[: len(of)]


@pytest.mark.parametrize("names", [["plain"], ["chatml"], ["chatml", "plain"], ["plain", "chatml", "chatml"]], ids=str)
def test_every_row_ends_where_its_expert_ends(
    originals: dict[str, Original], model: MixedModel, names: list[str]
) -> None:
    inputs, before = together(originals, names), model.generation_config
    output = model.generate(**inputs, experts=names, max_new_tokens=ROOM)
    for row, name in enumerate(names):
        expected = originals[name].ids()
        assert len(expected) < ROOM
        assert new(output, inputs, row, expected) == expected
    assert model.generation_config is before


def test_answers_of_one_row_end_as_their_expert(originals: dict[str, Original], model: MixedModel) -> None:
    inputs = together(originals, NAMES)
    output = model.generate(
        **inputs, experts=NAMES, max_new_tokens=ROOM, num_return_sequences=2, do_sample=True, top_k=1
    )
    for row, name in enumerate(name for name in NAMES for _ in range(2)):
        assert new(output, inputs, row, originals[name].ids()) == originals[name].ids()


def test_what_the_caller_says_goes_first(originals: dict[str, Original], model: MixedModel) -> None:
    inputs = together(originals, NAMES)
    output = model.generate(**inputs, experts=NAMES, max_new_tokens=ROOM, eos_token_id=None)
    assert output.shape[1] == inputs["input_ids"].shape[1] + ROOM
    kept = model.generation_config.max_new_tokens
    model.generation_config.max_new_tokens = 3
    try:
        assert model.generate(**inputs, experts=NAMES).shape[1] == inputs["input_ids"].shape[1] + 3
    finally:
        model.generation_config.max_new_tokens = kept


def test_one_list_of_ends_for_several_is_refused(originals: dict[str, Original], model: MixedModel) -> None:
    inputs = together(originals, NAMES)
    with pytest.raises(ModelError, match=r"'plain' and 'chatml' differ in eos_token_id .*; num_beams .*eos_token_id="):
        model.generate(**inputs, experts=NAMES, max_new_tokens=4, num_beams=2)
    model.generate(**inputs, experts=NAMES, max_new_tokens=4, num_beams=2, eos_token_id=2)
    model.generate(**together(originals, ["chatml"]), experts="chatml", max_new_tokens=4, num_beams=2)


def test_settings_that_cannot_hold_in_one_batch_are_refused(originals: dict[str, Original], tmp_path: Path) -> None:
    file = originals["chatml"].path / "generation_config.json"
    text = file.read_text()
    try:
        file.write_text(
            json.dumps({**json.loads(text), "repetition_penalty": 3.0, "temperature": 0.5, "pad_token_id": 2})
        )
        model = bundled(originals, tmp_path / "b")
        expected = Original(originals["chatml"].path).ids()
    finally:
        file.write_text(text)
    inputs = together(originals, ["chatml"])
    assert new(model.generate(**inputs, experts="chatml", max_new_tokens=ROOM), inputs, 0, expected) == expected
    assert expected != originals["chatml"].ids()
    both = together(originals, NAMES)
    with pytest.raises(
        ModelError, match=r"'plain' and 'chatml' differ in repetition_penalty \(None and 3.0\); say rep"
    ):
        model.generate(**both, experts=NAMES, max_new_tokens=4)
    model.generate(**both, experts=NAMES, max_new_tokens=4, repetition_penalty=1.0)
    with pytest.raises(ModelError, match="differ in temperature"):
        model.generate(**both, experts=NAMES, max_new_tokens=4, repetition_penalty=1.0, do_sample=True)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({"plain", "chatml"}, "a set"),
        (7, "a int"),
        (b"ab", "a bytes"),
        ({"plain": "much"}, "finite weights"),
        ({"plain": None}, "finite weights"),
        ({7: 1.0}, "no expert 7"),
    ],
)
def test_what_names_no_expert_is_one_line(
    originals: dict[str, Original], model: MixedModel, experts: Any, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        model.generate(**together(originals, NAMES), experts=experts, max_new_tokens=2)


def test_none_is_the_average_in_a_mixture_too(originals: dict[str, Original], model: MixedModel) -> None:
    inputs = together(originals, ["plain"])
    expected = model(**inputs, experts={"average": 1, "plain": 3}).logits
    assert torch.equal(model(**inputs, experts={None: 1, "plain": 3}).logits, expected)


def test_inputs_that_are_given_twice_are_refused_as_in_transformers(
    originals: dict[str, Original], model: MixedModel
) -> None:
    ids = together(originals, ["plain"])["input_ids"]
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(ids, input_ids=ids[:, :3], experts="plain", max_new_tokens=2)


def test_threads_wait_for_each_other(originals: dict[str, Original], model: MixedModel) -> None:
    wrong = []

    def ask(name: str) -> None:
        inputs, expected = together(originals, [name]), originals[name].ids()
        for _ in range(5):
            made = model.generate(**inputs, experts=name, max_new_tokens=ROOM)
            if made[0, inputs["input_ids"].shape[1] :].tolist() != expected:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=[name]) for name in NAMES * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_that_would_share_rows_with_the_first_is_refused(model: MixedModel) -> None:
    with pytest.raises(ModelError, match="load it again"):
        copy.deepcopy(model)


def test_a_loaded_bundle_is_not_saved_as_if_it_were_its_average(merged: Merged, tmp_path: Path) -> None:
    model = load_model(merged("mixtral", compress_rate=0.6)[0])
    with pytest.raises(ModelError, match="its folder is a checkpoint of the average already"):
        model.hf.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
