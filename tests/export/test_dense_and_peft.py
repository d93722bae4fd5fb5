"""Exports open with plain transformers and PEFT and say the same as the bundle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from transformers import AutoModelForCausalLM

from polymerge import export_dense, export_peft, load_model, merge, verify
from polymerge.bundle.bundle import Bundle
from polymerge.errors import BundleError, ModelError, OutputExistsError
from tests.conftest import Merged
from tests.sweep.experts import make_experts as make_any_experts
from tests.tiny import VOCAB, make_experts

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral"])
def test_a_dense_export_is_the_expert(merged: Merged, tmp_path: Path, architecture: str) -> None:
    bundle, _ = merged(architecture, compress_rate=0.6)
    folder = export_dense(bundle, "e1", tmp_path / "e1")
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, load_model(bundle)(IDS, experts="e1").logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2"])
def test_a_head_that_is_tied_without_a_word_in_the_configuration_stays_tied(tmp_path: Path, architecture: str) -> None:
    experts = make_experts(architecture, tmp_path, count=2)
    for path in experts.values():  # as Google's and OpenAI's own
        config = json.loads((path / "config.json").read_text())
        assert config.pop("tie_word_embeddings")
        (path / "config.json").write_text(json.dumps(config))
    sources = {name: str(path) for name, path in experts.items()}
    bundle = merge({"experts": sources, "compress_rate": 0}, tmp_path / "bundle")
    folder = export_dense(bundle, "e1", tmp_path / "dense")
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(experts["e1"])(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, expected, atol=1e-5, rtol=0)


def test_a_peft_export_measures_the_ratios_that_it_drops(merged: Merged, tmp_path: Path) -> None:
    bundle, _ = merged("llama", compress_rate=0.6)
    written = export_peft(bundle, "e1", tmp_path / "e1")
    worst = 0.0
    for tensor, ratio in bundle.scales("e1").items():
        weight = bundle.reconstruct("e1", tensor).double()
        dropped = weight - (ratio - 1) * bundle.base_tensor(tensor).double()
        worst = max(worst, float((dropped - weight).norm() / weight.norm()))
    assert worst > 0
    assert written.dropped_ratio_error == pytest.approx(worst, rel=1e-4)
    shared, _ = merged("llama", compress_rate=0.6, scale="shared")
    exact = export_peft(shared, "e1", tmp_path / "shared")
    assert exact.dropped_ratio_error == 0.0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shared.path), exact.folder).eval()
    with torch.no_grad():
        expected = load_model(shared)(IDS, experts="e1").logits
        torch.testing.assert_close(adapted(IDS).logits, expected, atol=1e-5, rtol=0)


RECIPES = ({"method": "published", "compress_rate": 0.6}, {"compress_rate": 0.6}, {"compress_rate": 0})


def leaves_as_dense_alone(bundle: Bundle, folder: Path) -> None:
    """PEFT refuses the expert as it lies, and its dense checkpoint answers as it does."""
    average = AutoModelForCausalLM.from_pretrained(bundle.path)
    with pytest.raises((KeyError, ValueError), match="POLYMERGE_"):
        PeftModel.from_pretrained(average, bundle.expert_folder("e1"))
    dense = AutoModelForCausalLM.from_pretrained(export_dense(bundle, "e1", folder / "dense"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, load_model(bundle)(IDS, experts="e1").logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_own_numbers_of_a_module_around_others_are_refused_where_peft_could_not_open_them(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    config = hf.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=VOCAB, state_size=8)
    experts = {n: str(p) for n, p in make_experts("mamba", tmp_path, count=2, config=config).items()}
    bundle = merge({"experts": experts, **recipe}, tmp_path / "bundle")
    with pytest.raises(ModelError, match=r"'e1': PEFT has no place for numbers of 'backbone.layers.0.mixer' itself"):
        export_peft(bundle, "e1", tmp_path / "e1")
    assert not (tmp_path / "e1").exists() and verify(bundle, sources=True).ok
    leaves_as_dense_alone(bundle, tmp_path)


@pytest.mark.parametrize("recipe", RECIPES[:2])
def test_dense_layers_called_as_block_experts_are_refused_where_peft_would_leave_them_out(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    experts = {n: str(p) for n, p in make_any_experts("deepseek_v2", tmp_path, count=2).items()}
    bundle = merge({"experts": experts, **recipe}, tmp_path / "bundle")
    with pytest.raises(ModelError, match="'e1': PEFT takes dense layers and shared experts for parts of the mixture"):
        export_peft(bundle, "e1", tmp_path / "peft")
    assert not (tmp_path / "peft").exists() and verify(bundle).ok
    leaves_as_dense_alone(bundle, tmp_path)


@pytest.mark.parametrize("recipe", RECIPES[:2])
def test_listed_blocks_that_peft_does_not_join_are_refused(tmp_path: Path, recipe: dict[str, Any]) -> None:
    experts = {n: str(p) for n, p in make_any_experts("phimoe", tmp_path, count=2).items()}
    bundle = merge({"experts": experts, **recipe}, tmp_path / "bundle")
    with pytest.raises(ModelError, match="'e1': PEFT does not join the matrices of this architecture's mixture"):
        export_peft(bundle, "e1", tmp_path / "peft")
    assert not (tmp_path / "peft").exists() and verify(bundle).ok
    leaves_as_dense_alone(bundle, tmp_path)


def test_exports_refuse_unknown_experts_and_taken_places(merged: Merged, tmp_path: Path) -> None:
    bundle, _ = merged("llama", compress_rate=0.6)
    with pytest.raises(BundleError, match="no expert 'x'"):
        export_dense(bundle, "x", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            export_dense(bundle, "e0", tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
