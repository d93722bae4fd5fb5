"""Which tensors hold a mixture's matrices, and how they are seen one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from polymerge.errors import SourceError
from polymerge.sources.fused import SlicedCheckpoint, by_matrices
from polymerge.sources.opening import open_checkpoint
from polymerge.sources.slices import Fused, fused_parameters, slices_of
from tests.sweep.configs import tiny_config
from tests.sweep.experts import make_experts

pytestmark = pytest.mark.usefixtures("one_thread")

# Architecture -> what it has in one layer.
RULE = {
    "gpt_oss": {"gate_up_proj": Fused(4, transposed=True), "down_proj": Fused(4, transposed=True)},
    "granitemoe": {"gate_up_proj": Fused(4), "down_proj": Fused(4)},
    "dbrx": {"w1": Fused(4), "v1": Fused(4), "w2": Fused(4)},
    "jetmoe": {"weight": Fused(4)},
    "xlnet": {},  # three dimensions: width, heads, width of a head
    "zamba": {},  # a matrix a head of its state space, and decays, which multiply nothing
    "recurrent_gemma": {},  # gates, a block of a diagonal each
    "kimi_linear": {"gate_up_proj": Fused(4), "down_proj": Fused(4)},  # and no convolution
}


@pytest.mark.parametrize("architecture", RULE)
def test_a_mixtures_matrices_and_nothing_else(architecture: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture))
    fused = fused_parameters(model)
    assert {name.rpartition(".")[2]: what for name, what in fused.items()} == RULE[architecture]


@pytest.mark.parametrize("architecture", ["granitemoe", "dbrx"])
def test_slices_are_the_matrices_and_their_rows(architecture: str, tmp_path: Path) -> None:
    whole = open_checkpoint(make_experts(architecture, tmp_path, count=1)["e0"])
    view, layer_map = by_matrices(whole)
    cut = {name: record.slice for name, record in layer_map.records.items() if record.slice}
    assert len(cut) == 2 * 4 * len(RULE[architecture])
    assert view.tensors.keys() - cut.keys() == whole.tensors.keys() - {place.tensor for place in cut.values()}
    assert sum(info.numel for info in view.tensors.values()) == sum(info.numel for info in whole.tensors.values())
    for name, place in cut.items():
        matrix = whole.read(place.tensor).reshape(4, *view.tensors[name].shape)[place.index]
        assert torch.equal(view.read(name), matrix)
        assert torch.equal(view.read_rows(name, 3, 9), matrix[3:9])
        assert torch.equal(view.read_rows(name, 3, 10_000), matrix[3:])
        assert layer_map.records[name].role == "linear"


def test_what_a_bundle_holds_as_one_tensor_stays_one(tmp_path: Path) -> None:
    whole = open_checkpoint(make_experts("granitemoe", tmp_path, count=1)["e0"])
    view, layer_map = by_matrices(whole, whole=whole.tensors)
    assert view is whole
    assert {record.slice for record in layer_map.records.values()} == {None}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "granitemoe", "inkling2_text"])
def test_a_checkpoint_that_holds_parameters_as_the_model_does_is_a_usual_one(architecture: str, tmp_path: Path) -> None:
    folder = make_experts(architecture, tmp_path, count=1)["e0"]
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        tmp_path / "own", save_original_format=False
    )
    usual, records = by_matrices(open_checkpoint(folder))
    view, others = by_matrices(open_checkpoint(tmp_path / "own"))
    assert list(view.tensors) == list(usual.tensors)
    assert others.records == records.records
    for name in usual.tensors:
        assert torch.equal(view.read(name), usual.read(name))
        if usual.tensors[name].shape:
            assert torch.equal(view.read_rows(name, 1, 3), usual.read_rows(name, 1, 3))


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    whole = open_checkpoint(make_experts("dbrx", tmp_path, count=1)["e0"])
    name = "transformer.blocks.0.ffn.experts.mlp.w1"
    slices = {place.name: place for place in slices_of(name, (4, 64, 64), 4)}
    with pytest.raises(SourceError, match=r"w1.*\[256, 64\], expected \[4, 64, 64\]"):
        SlicedCheckpoint(whole, slices)
