"""A base stored in 8 bits: the numbers are those of compressed-tensors, and everything that reads a bundle knows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from polymerge import Bundle, add_expert, export_dense, inspect_bundle, load_model, merge, quantize_bundle, verify
from polymerge.engine.local.engine import HFEngine
from polymerge.errors import BundleError, DataError, ModelError, OutputExistsError
from polymerge.export import plan_vllm
from polymerge.export.packing import BASE_WAYS, packable, packing_of
from polymerge.export.quantise import QuantisedBundle
from polymerge.export.rounding import Nearest, input_moments
from polymerge.export.vllm.prompts import builtin_prompts
from polymerge.search.examples import Example
from polymerge.sources.packed import EIGHT_BITS, Form, dequantise, four_bits, grid_of, pack, scales_of, unpack
from tests.tiny import COMMON, make_experts, tiny_tokenizer

MakeBundle = Callable[..., tuple[Bundle, QuantisedBundle]]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """A bundle, and the same with its base in 8 bits."""
    made: dict[str, tuple[Bundle, QuantisedBundle]] = {}

    def get(base: str = "int8", width: int = 48, **recipe: object) -> tuple[Bundle, QuantisedBundle]:
        key = f"{base}-{width}-{sorted(recipe.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("quantised")
            config = transformers.LlamaConfig(**COMMON | {"hidden_size": width})
            experts = make_experts("llama", folder / "experts", config=config)
            for path in experts.values():
                tiny_tokenizer().save_pretrained(path)
            settings = {"compress_rate": 0.5, "dtype": "bfloat16", **recipe}
            bundle = merge({"experts": {n: str(p) for n, p in experts.items()}, **settings}, folder / "bundle")
            made[key] = bundle, quantize_bundle(bundle, folder / "small", base=base, device="cpu")
        return made[key]

    return get


@pytest.mark.parametrize("form", [EIGHT_BITS, Form(4, 32)])
@pytest.mark.parametrize("columns", [1, 4, 7, 48])
def test_packing_goes_there_and_back(columns: int, form: Form) -> None:
    numbers = torch.randint(-form.half, form.half, (5, columns), dtype=torch.int8)
    packed = pack(numbers, form)
    assert packed.shape == form.packed_shape(5, columns) and torch.equal(unpack(packed, columns, form), numbers)


@pytest.mark.parametrize("form", [EIGHT_BITS, Form(4, 32)])
def test_the_layout_is_that_of_compressed_tensors(form: Form) -> None:
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    numbers = torch.randint(-form.half, form.half, (6, 37), dtype=torch.int8)
    assert torch.equal(pack(numbers, form), theirs.pack_to_int32(numbers, form.bits))
    assert torch.equal(unpack(theirs.pack_to_int32(numbers, form.bits), 37, form), numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_the_nearest_level_of_its_row(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    scale = scales_of(weight, EIGHT_BITS, dtype)
    numbers = grid_of(scale, EIGHT_BITS, 50).numbers(weight.float()).to(torch.int8)
    assert scale.dtype == dtype and scale.shape == (9, 1) and numbers.abs().amax() >= 126
    error = (dequantise(numbers, scale, EIGHT_BITS, torch.float32) - weight.float()).abs()
    assert bool((error <= scale.float() * 0.5001 + (scale.float() * 1.01 if dtype is torch.bfloat16 else 0)).all())
    assert not dequantise(numbers, scale, EIGHT_BITS, dtype)[3].any()


def test_a_row_of_tiny_numbers_keeps_them_in_float16() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-6
    scale = scales_of(weight, EIGHT_BITS, torch.float16)
    rounded = grid_of(scale, EIGHT_BITS, 64).round(weight)
    assert (rounded - weight).abs().max() <= 2.0**-25 * 1.001  # half the smallest step of float16


def test_four_bits_have_a_scale_a_group_and_clip_where_that_is_nearer() -> None:
    form = four_bits([64, 96, 7])
    assert form == Form(4, 32) and four_bits([256, 128]).group == 128 and not form.takes(7)
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    scale = scales_of(weight, form, torch.float32)
    assert scale.shape == form.scale_shape(16, 96) == (16, 3)
    rounded = grid_of(scale, form, 96).round(weight)
    plain = grid_of(weight.view(16, 3, 32).abs().amax(-1) / 7, form, 96).round(weight)
    assert (rounded - weight).norm() < (plain - weight).norm()
    assert all(len(group.unique()) <= 16 for group in rounded.view(-1, 32))


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
    _, made = quantised(norms="average")
    more = make_experts("llama", tmp_path)["e1"]
    tiny_tokenizer().save_pretrained(more)
    bundle = add_expert(made.bundle, "more", str(more)).bundle
    assert bundle.manifest.base_code == "int8" and verify(bundle).ok and "more" in bundle.experts


@torch.no_grad()
def test_gptq_moves_the_outputs_less_than_rounding_to_the_nearest(quantised: MakeBundle) -> None:
    bundle, nearest = quantised()
    _, made = quantised(base="gptq-int8")
    assert made.bundle.manifest.base_code == "int8" and made.after.base == nearest.after.base
    model = load_model(bundle, device="cpu")
    engine = HFEngine.from_bundle(bundle, device="cpu")
    texts = {e: [engine.encode(p.prompt) for p in builtin_prompts()] for e in bundle.experts}
    layers, _ = packable(bundle, 8)
    moments = input_moments(model, texts, [layer.module for layer in layers.values()])
    lost = {"nearest": 0.0, "gptq": 0.0}
    for name, layer in layers.items():
        exact = bundle.base_tensor(name).float()
        for way, other in (("nearest", nearest), ("gptq", made)):
            error = other.bundle.base_tensor(name).float() - exact
            lost[way] += float((error @ moments[layer.module].matrix * error).sum())
    assert lost["gptq"] < 0.9 * lost["nearest"]


@torch.no_grad()
def test_moments_are_those_of_the_inputs_that_layers_are_given(quantised: MakeBundle) -> None:
    bundle, _ = quantised()
    model, ids = load_model(bundle, device="cpu"), [[1, 5, 9, 3], [7, 2]]
    seen: dict[str, list[torch.Tensor]] = {"self_attn.k_proj": [], "mlp.down_proj": []}
    names = {part: f"model.layers.1.{part}" for part in seen}
    for part, name in names.items():
        model.hf.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, part=part: seen[part].append(inputs[0].flatten(0, 1))  # type: ignore[misc]
        )
    moments = input_moments(model, {bundle.experts[0]: ids}, [*names.values(), "model.layers.1.self_attn.v_proj"])
    for part, name in names.items():
        x = torch.cat(seen[part][:2])
        torch.testing.assert_close(moments[name].matrix, x.T @ x / 6)
    assert moments["model.layers.1.self_attn.v_proj"] is moments[names["self_attn.k_proj"]]


def test_moments_are_gathered_for_as_many_layers_as_the_budget_holds(
    quantised: MakeBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle, _ = quantised()
    _, whole = quantised(base="gptq-int8")
    monkeypatch.setattr("polymerge.export.rounding.BUDGET", 1)
    one = quantize_bundle(bundle, tmp_path / "one", base="gptq-int8", device="cpu")
    assert one.bundle.digest == whole.bundle.digest


@torch.no_grad()
def test_a_base_in_four_bits_is_whole_and_opens(quantised: MakeBundle, tmp_path: Path) -> None:
    _, made = quantised(base="gptq-int4", width=64, norms="average")
    assert made.bundle.manifest.base_code == "int4" and verify(made.bundle, sources=True).ok
    settings = json.loads((made.bundle.path / "config.json").read_text())["quantization_config"]
    kept = {name.rsplit(".")[-1] for name in settings["ignore"]}
    assert kept == {"lm_head", "down_proj"}  # whose rows have 80 numbers
    _, eight = quantised(width=64, norms="average")
    assert made.after.base < eight.after.base and made.after.experts == eight.after.experts
    assert inspect_bundle(made.bundle).base_code == "int4"
    ids, expert = torch.tensor([[1, 5, 9, 3, 7]]), made.bundle.experts[0]
    folder = export_dense(made.bundle, expert, tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(made.bundle, device="cpu")
    torch.testing.assert_close(ours(ids, experts=expert).logits, dense(ids).logits, atol=5e-2, rtol=5e-2)
    for base in ("int8", "int4"):
        with pytest.raises(ModelError, match="stored in int4; load it with base 16bit"):
            load_model(made.bundle, device="cpu", base=base)
    more = make_experts("llama", tmp_path, config=transformers.LlamaConfig(**COMMON | {"hidden_size": 64}))["e1"]
    tiny_tokenizer().save_pretrained(more)
    copy = shutil.copytree(made.bundle.path, tmp_path / "copy")
    assert verify(add_expert(copy, "more", str(more)).bundle).ok


@torch.no_grad()
def test_transformers_opens_an_average_in_four_bits(quantised: MakeBundle) -> None:
    pytest.importorskip("compressed_tensors")
    _, made = quantised(base="gptq-int4", width=64, norms="average")
    ids = torch.tensor([[1, 5, 9, 3, 7]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.bundle.path, dtype=torch.float32)
    ours = load_model(made.bundle, device="cpu")
    torch.testing.assert_close(ours(ids, experts=None).logits, theirs(ids).logits, atol=2e-2, rtol=2e-2)


def test_a_layer_that_no_text_comes_to_is_rounded_to_the_nearest_in_eight_bits_and_kept_in_four(
    quantised: MakeBundle,
) -> None:
    bundle, _ = quantised(width=64, norms="average")
    model, matrices = load_model(bundle, device="cpu"), packable(bundle, 8)
    eight = packing_of(bundle, BASE_WAYS["gptq-int8"], matrices, model, {})
    name, layer = next(iter(matrices[0].items()))
    weight = bundle.base_tensor(name)
    for one, other in zip(
        eight.rounder(layer, weight), Nearest(EIGHT_BITS, torch.bfloat16)(layer, weight), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(ModelError, match="no text comes to a linear layer whose rows have whole groups of 64"):
        packing_of(bundle, BASE_WAYS["gptq-int4"], matrices, model, {})


@torch.no_grad()
def test_block_experts_are_packed_too_and_transformers_opens_them(tmp_path: Path) -> None:
    experts = make_experts("mixtral", tmp_path, count=2)
    for path in experts.values():
        tiny_tokenizer().save_pretrained(path)
    settings = {"compress_rate": 0.5, "dtype": "bfloat16"}
    bundle = merge({"experts": {n: str(p) for n, p in experts.items()}, **settings}, tmp_path / "bundle")
    made = quantize_bundle(bundle, tmp_path / "small", device="cpu").bundle
    packed = made.packed()
    assert packed is not None and packed.is_packed("model.layers.0.block_sparse_moe.experts.0.w1.weight")
    assert verify(made, sources=True).ok
    calibrated = quantize_bundle(bundle, tmp_path / "gptq", base="gptq-int8", device="cpu").bundle
    assert verify(calibrated, sources=True).ok and calibrated.digest != made.digest
    with pytest.raises(
        ModelError,
        match="is run together with others in one tensor, for which GPTQ has no calibration here; --base int8 packs it",
    ):
        quantize_bundle(bundle, tmp_path / "four", base="gptq-int4", device="cpu")
    ids = torch.tensor([[1, 5, 9, 3, 7]])
    if find_spec("torchao") and find_spec("accelerate"):
        held, whole = (
            load_model(made, device="cpu", base=base)(ids, experts="e0").logits for base in ("int8", "16bit")
        )
        torch.testing.assert_close(held, whole, atol=2e-2, rtol=2e-2)
    pytest.importorskip("compressed_tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    ours = load_model(made, device="cpu")
    torch.testing.assert_close(ours(ids, experts=None).logits, theirs(ids).logits, atol=2e-2, rtol=2e-2)


def test_bad_input_is_one_line(quantised: MakeBundle, tmp_path: Path) -> None:
    bundle, made = quantised()
    with pytest.raises(ModelError, match="stored in int8 already"):
        quantize_bundle(made.bundle, tmp_path / "again")
    with pytest.raises(ModelError, match="'int4' is not stored: there is int8, gptq-int8, gptq-int4"):
        quantize_bundle(bundle, tmp_path / "four", base="int4")
    with pytest.raises(DataError, match=f"prompts of '{bundle.experts[0]}': 1 read; one calibrates and one measures"):
        quantize_bundle(bundle, tmp_path / "g", base="gptq-int8", prompts={bundle.experts[0]: [Example("a")]})
    with pytest.raises(BundleError, match="no expert 'nobody'"):
        quantize_bundle(bundle, tmp_path / "b", prompts={"nobody": []})
    with pytest.raises(OutputExistsError, match=r"exists; give another --output$"):  # the command has no --overwrite
        quantize_bundle(bundle, made.bundle.path)
    assert not list(tmp_path.iterdir())


def test_vllm_and_transformers_are_told_what_is_packed(quantised: MakeBundle) -> None:
    _, made = quantised()
    with safe_open(made.bundle.path / "model.safetensors", framework="pt") as handle:
        names = list(handle.keys())
    assert any(name.endswith("q_proj.weight_packed") for name in names) and "lm_head.weight_packed" not in names
    settings = json.loads((made.bundle.path / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized" and "lm_head" in settings["ignore"]


def test_vllm_computes_in_16_bits_over_a_packed_base(quantised: MakeBundle) -> None:
    """Its kernels for packed weights take no others: a server of float32 starts, and fails at the first request."""
    whole, made = quantised(dtype="float32")
    assert (plan_vllm(whole).dtype_name, plan_vllm(made.bundle).dtype_name) == ("float32", "bfloat16")
    assert plan_vllm(made.bundle).slot_bytes * 2 == plan_vllm(whole).slot_bytes
