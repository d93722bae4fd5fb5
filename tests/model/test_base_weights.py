"""Two models of one bundle in one process: the average's weights are there once, and both say what they said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polymerge import load_model, merge
from polymerge.errors import ModelError
from polymerge.model.base_weights import BaseWeights
from tests.conftest import Merged
from tests.tiny import make_experts

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def logits(model: Any, experts: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(IDS, experts=experts).logits
    return made


def near(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)  # sums of other shapes round otherwise


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gemma3", "mixtral", "phi3"])
def test_a_second_model_has_the_firsts_average_and_its_own_experts(
    merged: Merged, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    bundle = merged(architecture)[0]
    first = load_model(bundle, device="cpu")
    expected = logits(first, ["e0", "e2"]), logits(first, [None, "e0"])
    assert first.base_weights is not None
    storages = {p.untyped_storage().data_ptr() for p in first.hf.parameters()}

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the average was read or tried again")

    monkeypatch.setattr("polymerge.model.loading._opened", read)
    monkeypatch.setattr("polymerge.model.loading.Trial", read)
    second = load_model(bundle.only(["e0", "e2"]), device="cpu", beside=first)
    assert second.experts == ["e0", "e2"]
    assert {p.untyped_storage().data_ptr() for p in second.hf.parameters()} <= storages
    for model in (second, load_model(bundle, device="cpu", beside=second)):  # and the other way, without the first
        near(logits(model, ["e0", "e2"]), expected[0])
        near(logits(model, [None, "e0"]), expected[1])
        with pytest.raises(ModelError):
            second(IDS, experts="e1")
    near(logits(first, ["e0", "e2"]), expected[0])


def test_what_cannot_be_lent_is_loaded(merged: Merged) -> None:
    bundle = merged("llama")[0]
    first = load_model(bundle, device="cpu", dtype="bfloat16")
    second = load_model(bundle, device="cpu", dtype="float32", beside=first)
    assert second.dtype is torch.float32
    assert first.base_weights is not None and first.base_weights.model() is not None
    first.base_weights._parameters.pop("model.norm.weight")
    assert BaseWeights.model(first.base_weights) is None
    again = load_model(bundle, device="cpu", dtype="bfloat16", beside=first)
    assert torch.equal(logits(again, ["e0", "e1"]), logits(first, ["e0", "e1"]))


def test_another_average_is_refused_and_a_model_that_was_moved_lends_nothing(merged: Merged, tmp_path: Path) -> None:
    bundle = merged("llama")[0]
    first = load_model(bundle, device="cpu")
    others = make_experts("llama", tmp_path, count=2, seed=7)
    other = merge({"experts": {name: str(path) for name, path in others.items()}}, tmp_path / "other")
    with pytest.raises(ModelError, match="its average is not that of the model beside it"):
        load_model(other, device="cpu", beside=first)
    expected = logits(first, ["e0", "e1"])
    first.to(torch.bfloat16)
    again = load_model(bundle, device="cpu", dtype="float32", beside=first)
    assert all(parameter.dtype is torch.float32 for parameter in again.parameters())
    near(logits(again, ["e0", "e1"]), expected)
