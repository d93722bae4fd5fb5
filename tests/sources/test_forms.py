"""Where stored rows lie in a model: what the rules say, and what transformers' own loader does with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from polymerge.sources.forms import forms_of, in_order
from tests.sweep.configs import tiny_config


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "hrm_text", "olmo_hybrid", "inkling2_text"])
def test_every_stored_row_is_where_the_forms_say(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture)).float()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    stored, state, forms = load_file(tmp_path / "model.safetensors"), model.state_dict(), forms_of(model)
    assert stored.keys() <= forms.keys()
    for name, tensor in stored.items():
        for part in forms[name]:
            turned = tensor.transpose(-1, -2) if part.transposed else tensor
            rows = turned.reshape(-1, turned.shape[-1]) if turned.dim() > 1 else turned
            here = state[part.parameter]
            here = here.reshape(-1, here.shape[-1]) if here.dim() > 1 else here
            assert torch.equal(rows[part.source], here[part.target]), name


def test_rows_in_another_order_are_put_in_the_parameters() -> None:
    stored = torch.arange(6.0).view(3, 2)
    order = torch.tensor([2, 0, 1])
    assert in_order(stored, order)[:, 0].tolist() == [4.0, 0.0, 2.0]  # type: ignore[index]
    assert in_order(stored, None) is stored and in_order(None, order) is None
