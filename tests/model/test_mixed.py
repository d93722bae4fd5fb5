"""The mixed-expert model against its two oracles: dense rebuilt experts run alone, and PEFT with the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from polymerge import Bundle, export_dense, load_model, merge
from polymerge.errors import ModelError
from polymerge.model.own import OwnModule, OwnNorm
from tests.conftest import Merged
from tests.tiny import ARCHITECTURES, VOCAB

ROWS = ["e1", "e0", None, "e2", "e1"]


def batch() -> dict[str, torch.Tensor]:
    """Five rows, two of them padded on the left."""
    ids = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[3, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def row(inputs: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    return {name: value[number : number + 1] for name, value in inputs.items()}


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def dense_models(bundle: Bundle, folder: Path) -> dict[str | None, Any]:
    models: dict[str | None, Any] = {name: plain(export_dense(bundle, name, folder / name)) for name in bundle.experts}
    return models | {None: plain(bundle.path)}


def distance(got: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest difference of logits at positions that are not padding."""
    return float((got - expected)[mask.bool()].abs().max())


@pytest.mark.parametrize("scale", ["per_expert", "shared"])
@pytest.mark.parametrize("rate", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_one_batch_of_all_experts_equals_each_dense_expert_alone(
    merged: Merged, tmp_path: Path, architecture: str, rate: float, scale: str
) -> None:
    bundle, _ = merged(architecture, compress_rate=rate, scale=scale)
    model, dense, inputs = load_model(bundle), dense_models(bundle, tmp_path), batch()
    got = model(**inputs, experts=ROWS).logits
    for number, expert in enumerate(ROWS):
        alone = row(inputs, number)
        expected = dense[expert](**alone).logits
        assert distance(got[number : number + 1], expected, alone["attention_mask"]) < 1e-5
        if expert is not None:  # the test must be able to fail: the expert says something else than the average
            assert distance(expected, dense[None](**alone).logits, alone["attention_mask"]) > 1e-2
    together = dense["e1"](**inputs).logits
    assert distance(model(**inputs, experts="e1").logits, together, inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
@torch.no_grad()
def test_peft_opens_every_expert_and_says_the_same(merged: Merged, architecture: str, rate: float) -> None:
    bundle, _ = merged(architecture, compress_rate=rate, scale="shared")
    model, inputs = load_model(bundle), batch()
    if rate == 0.0 and architecture in ("mixtral", "qwen3-moe"):  # what PEFT has no place for it must refuse
        with pytest.raises((ValueError, KeyError), match="POLYMERGE_WHOLE_BLOCKS"):
            PeftModel.from_pretrained(plain(bundle.path), bundle.expert_folder("e0"))
        return
    for expert in bundle.experts:
        adapted = PeftModel.from_pretrained(plain(bundle.path), bundle.expert_folder(expert)).eval()
        expected = adapted(**inputs).logits
        got = model(**inputs, experts=expert).logits
        assert distance(got, expected, inputs["attention_mask"]) < 1e-5
        assert distance(got, plain(bundle.path)(**inputs).logits, inputs["attention_mask"]) > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral"])
@torch.no_grad()
def test_generate_equals_dense_generation_row_by_row(merged: Merged, tmp_path: Path, architecture: str) -> None:
    bundle, _ = merged(architecture, compress_rate=0.6)
    model, dense, inputs = load_model(bundle), dense_models(bundle, tmp_path), batch()
    inputs.pop("position_ids")
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(**inputs, experts=ROWS, **greedy)
    for number, expert in enumerate(ROWS):
        assert torch.equal(got[number], dense[expert].generate(**row(inputs, number), **greedy)[0])


@torch.no_grad()
def test_beams_keep_their_rows_expert(merged: Merged, tmp_path: Path) -> None:
    bundle, _ = merged("llama", compress_rate=0.6)
    model, dense, inputs = load_model(bundle), dense_models(bundle, tmp_path), batch()
    inputs.pop("position_ids")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(**inputs, experts=ROWS, **options)
    for number, expert in enumerate(ROWS):
        assert torch.equal(got[number], dense[expert].generate(**row(inputs, number), **options)[0])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "qwen2"])
@torch.no_grad()
def test_a_mixture_is_the_model_of_the_mixed_weights(merged: Merged, tmp_path: Path, architecture: str) -> None:
    bundle, _ = merged(architecture, compress_rate=0.6)
    mixture = {"e0": 1.0, "e2": 3.0}
    weights = {}
    for layer in bundle.layers.values():
        weights[layer.tensor] = 0.25 * bundle.reconstruct("e0", layer.tensor) + 0.75 * bundle.reconstruct(
            "e2", layer.tensor
        )
    folder = export_dense(bundle, "e0", tmp_path / "mixed")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    inputs = batch()
    expected = plain(folder)(**inputs).logits
    model = load_model(bundle)
    assert distance(model(**inputs, experts=mixture).logits, expected, inputs["attention_mask"]) < 1e-4
    beside = model(**inputs, experts=["e1", mixture, None, mixture, "e0"]).logits
    assert distance(beside[1::2], expected[1::2], inputs["attention_mask"][1::2]) < 1e-4


@torch.no_grad()
def test_many_experts_in_one_batch_go_one_by_one(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = merged("llama", compress_rate=0.6)
    model, inputs = load_model(bundle), batch()
    stacked = model(**inputs, experts=ROWS).logits
    monkeypatch.setattr("polymerge.model.linear.MAX_TOGETHER", 0)
    apart = model(**inputs, experts=ROWS).logits
    torch.testing.assert_close(apart, stacked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_average_is_the_plain_checkpoint_to_the_bit(merged: Merged) -> None:
    bundle, _ = merged("llama", compress_rate=0.6)
    inputs = batch()
    assert torch.equal(load_model(bundle)(**inputs).logits, plain(bundle.path)(**inputs).logits)


def test_no_dense_copy_of_an_expert_is_held(merged: Merged) -> None:
    bundle, _ = merged("llama", compress_rate=0.9, embeddings="average", lm_head="average", norms="average")
    model = load_model(bundle)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    stored = bundle.sizes().total
    rotary = 1000
    assert sum(held.values()) <= stored + rotary


def test_norms_take_the_fast_path(merged: Merged) -> None:
    for architecture in ("llama", "gemma3", "qwen3", "gpt2", "gpt-neox"):
        bundle, _ = merged(architecture, compress_rate=0.6)
        modules = list(load_model(bundle).stand_ins)
        assert any(isinstance(module, OwnNorm) for module in modules)
        slow = [type(module.inner).__name__ for module in modules if isinstance(module, OwnModule)]
        assert not [name for name in slow if "norm" in name.lower()], architecture


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ("mat", ["no expert 'mat'", "e0, e1, e2"]),
        ("e3", ["did you mean"]),
        (["e0"], ["1 entries", "5 rows"]),
        ({"e0": -1.0, "e1": 1.0}, ["mixture"]),
        ({}, ["mixture"]),
        ({"e0": 0.0}, ["mixture"]),
        ({"e0": float("nan"), "e1": 1.0}, ["mixture", "finite"]),
        ({"e0": float("inf"), "e1": 1.0}, ["mixture", "finite"]),
        ([3, None, None, None, None], ["3", "neither"]),
    ],
)
def test_wrong_experts_are_one_clear_line(merged: Merged, experts: Any, words: list[str]) -> None:
    bundle, _ = merged("llama", compress_rate=0.6)
    model = load_model(bundle)
    with pytest.raises(ModelError) as caught:
        model(**batch(), experts=experts)
    assert all(word in str(caught.value) for word in words), caught.value
    assert torch.isfinite(model(**batch()).logits).all()  # and the next request is served


def test_a_tensor_without_a_place_is_never_ignored(merged: Merged, tmp_path: Path) -> None:
    bundle, experts = merged("llama", compress_rate=0.6)
    copy = merge(
        {"experts": {k: str(v) for k, v in experts.items()}, "code": "factors", "compress_rate": 0.6}, tmp_path / "copy"
    )
    file = copy.expert_folder("e1") / "adapter_model.safetensors"
    adapter = load_file(file)
    adapter["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(1, 48)
    save_file(adapter, file, {"format": "pt"})
    opened = Bundle(copy.path, copy.manifest)  # past the size check of Bundle.open
    with pytest.raises(ModelError, match=r"layers\.7.*'e1'.*no place"):
        load_model(opened)
    del bundle
