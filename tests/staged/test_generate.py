"""`polymerge.generate` from Python: what stands for a prompt, an expert and a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polymerge import generate, merge
from polymerge.engine.base import GenerateRequest
from polymerge.errors import PolymergeError
from tests.tiny import make_experts, tiny_tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    experts = make_experts("llama", folder, count=2)
    for path in experts.values():
        tiny_tokenizer().save_pretrained(path)
    return merge({name: str(path) for name, path in experts.items()}, folder / "b", compress_rate=0.0).path


@pytest.mark.parametrize("prompt", [None, 123, ["w3", "w4"], [{"role": "user", "content": "w3"}], b"w3"], ids=str)
def test_what_is_no_text_is_not_answered(bundle: Path, prompt: Any) -> None:
    with pytest.raises(PolymergeError, match="a prompt is one text, not a "):
        generate(bundle, prompt, max_new_tokens=2)


def test_an_expert_is_named_as_for_a_loaded_model(bundle: Path) -> None:
    words = generate(bundle, "w3 w4", expert="e0:0.9+e1:0.1", max_new_tokens=6)
    assert generate(bundle, "w3 w4", expert={"e0": 0.9, "e1": 0.1}, max_new_tokens=6).text == words.text
    average = generate(bundle, "w3 w4", max_new_tokens=6)
    assert generate(bundle, "w3 w4", expert=None, max_new_tokens=6).text == average.text != words.text


def test_no_token_is_an_empty_answer(bundle: Path) -> None:
    assert generate(bundle, "w3 w4", expert="e0", max_new_tokens=0).text == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "4"),
        ("max_new_tokens", None),
        ("max_new_tokens", True),
        ("seed", 2**70),
        ("seed", 0.5),
        ("temperature", "1"),
        ("temperature", None),
        ("top_p", [1]),
    ],
)
def test_a_number_that_means_nothing_is_one_line(name: str, value: Any) -> None:
    with pytest.raises(PolymergeError, match=f"^generate: {name} .*{str(value)[:3]}".replace("[", r"\[")):
        GenerateRequest("w3", **{"temperature": 1.0, name: value})
