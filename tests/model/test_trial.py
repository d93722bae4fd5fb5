"""What the modules of real architectures do is found by running them, not by their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from polymerge.model.trial import Trial
from polymerge.model.watch import kind_of
from tests.sweep.configs import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture)).float().eval()
    for parameter in hf.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return hf.requires_grad_(False)


def test_layers_and_block_experts_are_one_kind() -> None:
    assert kind_of("model.layers.3.mlp.experts.12.up_proj") == "model.layers.*.mlp.experts.*.up_proj"
    assert kind_of("model.conv1d") == "model.conv1d"


def test_in_a_llama_every_parameter_is_its_modules_own_affair() -> None:
    hf = model_of("llama")
    trial = Trial(hf)
    assert not trial.objection
    for name, module in hf.named_modules():
        parameters = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        if parameters:
            assert trial.kind(name).plain and trial.read_by_itself(name, parameters)
            assert trial.holder(name, parameters) == kind_of(name)
    assert trial.kind("model.layers.0.mlp").rows
    assert not trial.kind("model.layers.0.self_attn").rows  # it has a cache of all rows


def test_a_weight_that_another_module_reads_is_held_by_who_reads_it() -> None:
    trial = Trial(model_of("qwen3_5_text"))
    assert not trial.read_by_itself("model.layers.0.linear_attn.conv1d", ["weight"])
    assert trial.holder("model.layers.0.linear_attn.conv1d", ["weight"]) is None  # only the whole model: states
    trial = Trial(model_of("hy_v3"))  # the block's correction of its router's scores, and the router's weight
    assert trial.holder("model.layers.1.mlp", ["e_score_correction_bias"]) == "model.layers.*.mlp"


def test_block_experts_that_see_chosen_tokens_alone_do_not_see_rows() -> None:
    hf = model_of("ernie4_5_moe" if _has_module_list("ernie4_5_moe") else "dbrx")
    trial = Trial(hf)
    linear = [n for n, m in hf.named_modules() if isinstance(m, torch.nn.Linear) and ".experts." in n]
    for name in linear:
        assert not trial.kind(name).plain
        assert trial.holder(name, ["weight"]) != kind_of(name)


def _has_module_list(architecture: str) -> bool:
    hf = model_of(architecture)
    return any(isinstance(m, torch.nn.Linear) and ".experts." in n for n, m in hf.named_modules())


def test_tokens_before_rows_are_seen_as_such() -> None:
    hf = model_of("xlnet")
    trial = Trial(hf)
    linear = [n for n, m in hf.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("transformer.layer")]
    assert linear and not any(trial.kind(name).plain for name in linear)


def test_the_model_is_as_it_was() -> None:
    hf = model_of("falcon_mamba")
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    classes = [type(module) for module in hf.modules()]
    Trial(hf)
    assert classes == [type(module) for module in hf.modules()]
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in hf.modules())


def test_a_model_that_changes_its_weights_while_it_runs_is_objected_to() -> None:
    config = tiny_config("rwkv")
    config.num_hidden_layers, config.rescale_every = 3, 2  # transformers divides the third layer's weights by two
    hf = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    assert "changes its own weights" in Trial(hf).objection


def test_a_model_that_wants_more_than_tokens_is_objected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = model_of("llama")
    monkeypatch.setattr(type(hf), "forward", lambda self, input_ids, pixels: None)
    assert "pixels" in Trial(hf).objection
