"""A base stored in 8 bits: the numbers are those of compressed-tensors, and everything that reads a bundle knows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from polymerge import Bundle, add_expert, export_dense, inspect_bundle, load_model, merge, quantize_bundle, verify
from polymerge.errors import BundleError, ModelError, OutputExistsError
from polymerge.export.quantise import QuantisedBundle
from polymerge.sources.packed import dequantise_rows, pack, quantise_rows, unpack
from tests.tiny import make_experts, tiny_tokenizer

MakeBundle = Callable[..., tuple[Bundle, QuantisedBundle]]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """A bundle, and the same with its base in 8 bits."""
    made: dict[str, tuple[Bundle, QuantisedBundle]] = {}

    def get(architecture: str = "llama", **recipe: object) -> tuple[Bundle, QuantisedBundle]:
        key = f"{architecture}-{sorted(recipe.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("quantised")
            experts = make_experts(architecture, folder / "experts")
            for path in experts.values():
                tiny_tokenizer().save_pretrained(path)
            settings = {"compress_rate": 0.5, "dtype": "bfloat16", **recipe}
            bundle = merge({"experts": {n: str(p) for n, p in experts.items()}, **settings}, folder / "bundle")
            made[key] = bundle, quantize_bundle(bundle, folder / "small", device="cpu")
        return made[key]

    return get


@pytest.mark.parametrize("columns", [1, 4, 7, 48])
def test_packing_goes_there_and_back(columns: int) -> None:
    numbers = torch.randint(-128, 128, (5, columns), dtype=torch.int8)
    assert torch.equal(unpack(pack(numbers), columns), numbers)


def test_the_layout_is_that_of_compressed_tensors() -> None:
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    numbers = torch.randint(-128, 128, (6, 37), dtype=torch.int8)
    assert torch.equal(pack(numbers), theirs.pack_to_int32(numbers, 8))
    assert torch.equal(unpack(theirs.pack_to_int32(numbers, 8), 37), numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_the_nearest_level_of_its_row(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    numbers, scale = quantise_rows(weight, dtype)
    assert scale.dtype == dtype and numbers.abs().amax() >= 126
    error = (dequantise_rows(numbers, scale, torch.float32) - weight.float()).abs()
    assert bool((error <= scale.float() * 0.5001 + (scale.float() * 1.01 if dtype is torch.bfloat16 else 0)).all())
    assert not dequantise_rows(numbers, scale, dtype)[3].any()


def test_a_quantised_bundle_says_so_is_whole_and_smaller(quantised: MakeBundle) -> None:
    bundle, made = quantised()
    manifest = json.loads((made.bundle.path / "polymerge.json").read_text())
    assert manifest["base_code"] == "int8" and manifest["format_version"] == 7
    assert verify(made.bundle).ok and verify(made.bundle, sources=True).problems == []
    assert made.after.base < bundle.sizes().base and made.after.one_model == pytest.approx(made.before.base, rel=0.15)
    assert made.after.experts == made.before.experts
    assert inspect_bundle(made.bundle).base_code == "int8" and inspect_bundle(bundle).base_code == "bfloat16"
    assert set(made.costs) == set(bundle.experts)
    assert all(0 < cost.kl < 0.1 and cost.tokens > 8 for cost in made.costs.values())


def test_what_is_not_a_linear_layer_is_stored_as_it_was(quantised: MakeBundle) -> None:
    bundle, made = quantised()
    for layer in bundle.manifest.layers:
        before, after = bundle.base_tensor(layer.tensor), made.bundle.base_tensor(layer.tensor)
        assert before.dtype == after.dtype and before.shape == after.shape
        if layer.role == "linear":
            assert 0 < float((before.float() - after.float()).norm() / before.float().norm()) < 0.02
        else:
            assert torch.equal(before, after)


@torch.no_grad()
def test_it_answers_as_the_numbers_that_are_stored(quantised: MakeBundle) -> None:
    _, made = quantised()
    model, ids = load_model(made.bundle, device="cpu"), torch.tensor([[1, 5, 9, 3, 7]])
    for expert in made.bundle.experts:
        folder = export_dense(made.bundle, expert, made.bundle.path.parent / f"dense-{expert}", overwrite=True)
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(model(ids, experts=expert).logits, dense(ids).logits, atol=5e-2, rtol=5e-2)


@torch.no_grad()
def test_transformers_opens_the_average(quantised: MakeBundle) -> None:
    pytest.importorskip("compressed_tensors")
    _, made = quantised()
    ids = torch.tensor([[1, 5, 9, 3, 7]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.bundle.path, dtype=torch.float32)
    ours = load_model(made.bundle, device="cpu")
    torch.testing.assert_close(ours(ids, experts=None).logits, theirs(ids).logits, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_int8_holds_the_stored_numbers_in_memory(quantised: MakeBundle) -> None:
    pytest.importorskip("torchao")
    _, made = quantised()
    ids, rows = torch.tensor([[1, 5, 9, 3, 7]]).repeat(3, 1), [*made.bundle.experts[:2], None]
    whole, small = (load_model(made.bundle, device="cpu", base=base) for base in ("16bit", "int8"))
    assert small.base == "int8" and small.base_divergence == 0.0
    torch.testing.assert_close(small(ids, experts=rows).logits, whole(ids, experts=rows).logits, atol=2e-2, rtol=2e-2)
    with pytest.raises(ModelError, match="its base is stored in int8; load it with base int8, or 16bit"):
        load_model(made.bundle, device="cpu", base="fp8" if torch.cuda.is_available() else "nf4")


def test_an_expert_can_be_added(quantised: MakeBundle, tmp_path: Path) -> None:
    _, made = quantised("llama", norms="average")
    more = make_experts("llama", tmp_path)["e1"]
    tiny_tokenizer().save_pretrained(more)
    bundle = add_expert(made.bundle, "more", str(more)).bundle
    assert bundle.manifest.base_code == "int8" and verify(bundle).ok and "more" in bundle.experts


def test_bad_input_is_one_line(quantised: MakeBundle, tmp_path: Path) -> None:
    bundle, made = quantised()
    with pytest.raises(ModelError, match="stored in int8 already"):
        quantize_bundle(made.bundle, tmp_path / "again")
    with pytest.raises(ModelError, match="'gptq-int4' is not stored: there is int8"):
        quantize_bundle(bundle, tmp_path / "four", base="gptq-int4")
    with pytest.raises(BundleError, match="no expert 'nobody'"):
        quantize_bundle(bundle, tmp_path / "b", prompts={"nobody": []})
    with pytest.raises(OutputExistsError):
        quantize_bundle(bundle, made.bundle.path)
    assert not list(tmp_path.iterdir())


def test_vllm_and_transformers_are_told_what_is_packed(quantised: MakeBundle) -> None:
    _, made = quantised()
    with safe_open(made.bundle.path / "model.safetensors", framework="pt") as handle:
        names = list(handle.keys())
    assert any(name.endswith("q_proj.weight_packed") for name in names) and "lm_head.weight_packed" not in names
    settings = json.loads((made.bundle.path / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized" and "lm_head" in settings["ignore"]
