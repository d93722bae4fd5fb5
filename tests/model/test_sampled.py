"""A loaded model whose layers compute something else than the bundle holds is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polymerge import load_model
from polymerge.errors import ModelError
from polymerge.model.linear import MixedLinear
from tests.conftest import Merged


def no_residuals(layer: MixedLinear, x: Tensor, y: Tensor) -> None:
    """As if every expert were the average."""


def no_ratios(layer: MixedLinear, x: Tensor, y: Tensor) -> None:
    layer.ratios, layer.scaled = [1.0] * len(layer.ratios), False
    layer._table = torch.ones(len(layer.ratios))
    RIGHT(layer, x, y)


def of_the_next(layer: MixedLinear, x: Tensor, y: Tensor) -> None:
    RIGHT(layer, x, y)
    y.copy_(y.roll(1, 0))


pytestmark = pytest.mark.usefixtures("one_thread")
RIGHT: Callable[..., None] = MixedLinear.add_residuals


@pytest.mark.parametrize("wrong", [no_residuals, no_ratios, of_the_next])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox"])
def test_a_model_with_wrong_layers_is_not_loaded(
    architecture: str, wrong: Callable[..., None], merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = merged(architecture, compress_rate=0.5, scale="per_expert")
    load_model(bundle)
    load_model(bundle, dtype="bfloat16", device="cpu")
    monkeypatch.setattr(MixedLinear, "add_residuals", wrong)
    with pytest.raises(ModelError, match=r"layer '.*' computes something else than the bundle holds for e[012]"):
        load_model(bundle)
