"""Hidden states against transformers' own, for every architecture; and that no layer runs for nothing."""

from typing import Any

import pytest
import torch
import transformers as hf

from polymerge.engine.local.hidden import hidden_states
from tests.tiny import ARCHITECTURES


def model_of(architecture: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(ARCHITECTURES[architecture]()).float().eval()
    ids = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@torch.inference_mode()
def test_states_are_transformers_own(architecture: str) -> None:
    model, inputs = model_of(architecture)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    for layers in ((-1,), (-2,), (0,), (1, 0), (-2, -3, -2)):
        for layer, state in zip(layers, hidden_states(model, layers, **inputs), strict=True):
            assert torch.equal(state, expected[layer])
    with pytest.raises(IndexError):
        hidden_states(model, (-len(expected) - 1,), **inputs)


@torch.inference_mode()
def test_the_pass_ends_at_the_last_layer_that_is_read() -> None:
    model, inputs = model_of("llama")
    ran = []
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    hidden_states(model, (-2,), **inputs)
    assert ran == list(range(len(model.layers) - 1))
    assert not any(layer._forward_pre_hooks for layer in model.layers)
