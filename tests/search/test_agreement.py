from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from polymerge.engine.local.engine import HFEngine
from polymerge.recipe.merge import load_recipe
from polymerge.search.agreement import Agreement, Reference, agreement
from polymerge.search.examples import Example
from tests.tiny import recipe_folder, tiny_tokenizer


class Counting:
    """An original that goes on with the next number, and ends after `last`."""

    def __init__(self, last: int) -> None:
        self.last, self.tokenizer, self.device = last, tiny_tokenizer(), torch.device("cpu")

    def model(self, ids: torch.Tensor) -> SimpleNamespace:
        following = torch.where(ids == self.last, 2, ids + 1)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 96).float())

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode(messages[0]["content"])


def test_an_answer_is_right_when_greedy_decoding_gives_exactly_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFEngine, "from_checkpoint", lambda source, **options: Counting(last=7))
    right = [Example("w3", "w4 w5 w6 w7"), Example("w5 w6", "w7")]
    short, long, other = Example("w3", "w4 w5"), Example("w6", "w7 w8"), Example("w3", "w5 w6 w7")
    reference = Reference("counting", [*right, short, long, other, Example("w3 w4 w5")])  # the last has no answer
    assert reference.accuracy == 2 / 5
    fit = reference.against(lambda ids: Counting(last=8).model(ids).logits)
    assert (fit.accuracy, fit.original_accuracy, fit.kept) == (1 / 5, 2 / 5, 1 / 2)  # `long` alone ends right
    each = reference.each(lambda ids: Counting(last=8).model(ids).logits)
    assert [e.right for e in each] == [False, False, False, True, False, None] and agreement(each) == fit
    assert [e.original_right for e in each] == [True, True, False, False, False, None]


def test_without_answers_there_is_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFEngine, "from_checkpoint", lambda source, **options: Counting(last=7))
    fit = Reference("counting", [Example("w3 w4 w5")]).against(lambda ids: Counting(last=8).model(ids).logits)
    assert (fit.accuracy, fit.original_accuracy, fit.kept) == (None, None, None)


def test_an_original_that_is_never_right_leaves_nothing_to_keep() -> None:
    assert Agreement(0.1, 0.5, 10, accuracy=0.0, original_accuracy=0.0).kept is None
    assert Agreement(0.1, 0.5, 10, accuracy=0.4, original_accuracy=0.8).kept == 0.5


def test_examples_that_run_together_give_what_each_gives_alone(tmp_path: Path) -> None:
    sources = load_recipe(recipe_folder(tmp_path, []) / "recipe.yaml").experts
    examples = [Example(" ".join(f"w{3 + word}" for word in range(1 + n % 4)), "w6 w7") for n in range(12)]
    reference, other = Reference(sources["e0"], examples), HFEngine.from_checkpoint(sources["e1"])
    sizes: list[int] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids))
        result: torch.Tensor = other.model(ids).logits
        return result

    together = reference.each(logits, together=20)
    calls, sizes = sizes, []
    alone = reference.each(logits, together=0)
    assert max(calls) > 1 and sum(calls) == len(sizes) == 12
    assert [e.kl for e in together] == pytest.approx([e.kl for e in alone], rel=1e-3, abs=1e-6)
    assert [(e.same, e.tokens, e.right) for e in together] == [(e.same, e.tokens, e.right) for e in alone]
