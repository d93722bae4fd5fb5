"""The merge against independent arithmetic, for every architecture."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from polymerge import Bundle, merge
from polymerge.bundle.adapter import adapter_of
from polymerge.errors import ErrorBudgetExceeded
from polymerge.sources.opening import open_checkpoint
from tests.conftest import Merged
from tests.killed import content
from tests.tiny import ARCHITECTURES, make_experts


def tensors(path: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rate_zero_gives_every_tensor_back_to_the_bit(merged: Merged, architecture: str) -> None:
    bundle, experts = merged(architecture, compress_rate=0.0)
    for name, path in experts.items():
        reader = bundle.expert_reader(name)
        for tensor, original in tensors(path).items():
            assert torch.equal(reader.read(tensor), original), f"{name} {tensor}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_weight_is_compressed_and_nothing_else(merged: Merged, architecture: str) -> None:
    bundle, experts = merged(architecture, compress_rate=0.5)
    compressed = {layer.tensor for layer in bundle.layers.values() if layer.role == "linear"}
    stored = tensors(experts["e0"])
    matrices = {name for name, value in stored.items() if value.dim() == 2}
    outside = {
        name for name in matrices if any(part in name for part in ("embed", "lm_head", "wte", "wpe", "gate.weight"))
    }
    assert compressed == matrices - outside
    assert all(line["storage"] == "low_rank" for line in bundle.stats())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_rate_one_is_the_normalised_average(merged: Merged, architecture: str) -> None:
    bundle, experts = merged(architecture, compress_rate=1.0)
    sources = [tensors(path) for path in experts.values()]
    for layer in bundle.layers.values():
        weights = [source[layer.tensor].double() for source in sources]
        if layer.role == "linear":
            norms = [w.norm() for w in weights]
            expected = sum(w / n for w, n in zip(weights, norms, strict=True)) / 3 * (sum(norms) / 3)
        else:
            expected = sum(weights) / 3
        torch.testing.assert_close(bundle.base_tensor(layer.tensor).double(), expected, rtol=1e-5, atol=1e-6)


def test_error_falls_with_the_rate_and_the_statistics_say_the_truth(merged: Merged) -> None:
    worst = []
    for rate in (1.0, 0.9, 0.7, 0.5, 0.2, 0.0):
        bundle, experts = merged("llama", compress_rate=rate)
        for line in bundle.stats():
            original = open_checkpoint(experts[line["expert"]]).read(line["tensor"])
            rebuilt = bundle.reconstruct(line["expert"], line["tensor"])
            error = float((original - rebuilt).norm() / original.norm())
            assert error == pytest.approx(line["relative_error"], abs=1e-6)
        worst.append(sum(line["relative_error"] ** 2 for line in bundle.stats()))
    assert worst == sorted(worst, reverse=True)
    assert len(set(worst)) == len(worst)
    assert worst[-1] == 0.0


def test_error_is_close_to_the_best_possible_at_the_rank(merged: Merged) -> None:
    bundle, experts = merged("llama", compress_rate=0.8)
    for line in bundle.stats():
        original = open_checkpoint(experts[line["expert"]]).read(line["tensor"]).double()
        residual = original - line["scale_ratio"] * bundle.base_tensor(line["tensor"]).double()
        optimum = torch.linalg.svdvals(residual)[line["rank"] :].norm() / original.norm()
        assert line["relative_error"] <= 1.02 * optimum + 1e-7


def test_shared_scale_has_no_ratios(merged: Merged) -> None:
    bundle, _ = merged("llama", scale="shared", compress_rate=0.7)
    assert bundle.manifest.scale_ratio_range == (1.0, 1.0)
    assert all(ratio == 1.0 for name in bundle.experts for ratio in bundle.scales(name).values())


def test_bfloat16_comes_back_within_one_rounding(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, dtype=torch.bfloat16)
    for rate in (0.0, 0.7):
        bundle = merge(
            {"experts": {k: str(v) for k, v in experts.items()}, "code": "factors", "compress_rate": rate},
            tmp_path / f"b{rate}",
        )
        assert bundle.manifest.dtype == "bfloat16"
        for line in bundle.stats():
            assert rate or line["relative_error"] == 0.0
    for name, path in experts.items():
        exact = Bundle.open(tmp_path / "b0.0").expert_reader(name)
        assert all(torch.equal(exact.read(t), v.float()) for t, v in tensors(path).items())


def test_average_stores_one_embedding_keep_stores_all(merged: Merged) -> None:
    kept, _ = merged("llama", compress_rate=0.5)
    averaged, _ = merged("llama", compress_rate=0.5, embeddings="average", lm_head="average", norms="average")
    assert "model.embed_tokens.weight" in adapter_of(kept, "e0")
    assert not [key for key in adapter_of(averaged, "e0") if ".lora_" not in key]


def test_what_all_experts_share_is_stored_once(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path)
    shared = tensors(experts["e0"])
    names = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    for path in experts.values():
        weights = tensors(path)
        save_file({**weights, **{name: shared[name] for name in names}}, path / "model.safetensors", {"format": "pt"})
    bundle = merge({"experts": {k: str(v) for k, v in experts.items()}, "code": "factors"}, tmp_path / "b")
    assert not [
        key for key in adapter_of(bundle, "e1") if key.startswith(tuple(n.removesuffix(".weight") for n in names))
    ]
    for name in names:
        assert torch.equal(bundle.reconstruct("e1", name), shared[name])


def test_workers_do_not_change_a_byte(checkpoints, tmp_path: Path) -> None:
    experts = {name: str(path) for name, path in checkpoints("mixtral").items()}
    contents = [
        content(merge({"experts": experts, "code": "factors", "workers": n}, tmp_path / f"w{n}").path)
        for n in (1, 2, 5)
    ]
    assert contents[0] == contents[1] == contents[2]


def test_shards_and_bin_files_give_the_same_weights(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path)
    whole = merge({"experts": {k: str(v) for k, v in experts.items()}, "code": "factors"}, tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(experts["e0"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    binary = tmp_path / "binary"
    shutil.copytree(experts["e1"], binary)
    (binary / "model.safetensors").unlink()
    torch.save(tensors(experts["e1"]), binary / "pytorch_model.bin")
    sources = {"e0": str(tmp_path / "sharded"), "e1": str(binary), "e2": str(experts["e2"])}
    mixed = merge({"experts": sources, "code": "factors"}, tmp_path / "mixed")
    weights = [{k: v.sha256 for k, v in b.manifest.files.items() if k.endswith(".safetensors")} for b in (whole, mixed)]
    assert weights[0] == weights[1]
    assert [e.sha256 for e in whole.manifest.experts.values()] == [e.sha256 for e in mixed.manifest.experts.values()]


@pytest.mark.parametrize("tied", [(True, True), (False, False), (True, False), (False, True)])
def test_tied_untied_and_mixed_experts(tmp_path: Path, tied: tuple[bool, bool]) -> None:
    sources = {}
    for number, tie in enumerate(tied):
        config = ARCHITECTURES["llama"]()
        config.tie_word_embeddings = tie
        made = make_experts("llama", tmp_path / str(number), count=1, seed=number, config=config)
        sources[f"e{number}"] = str(made["e0"])
    bundle = merge({"experts": sources, "code": "factors", "compress_rate": 0.0}, tmp_path / "bundle")
    config = json.loads((bundle.path / "config.json").read_text())
    assert config["tie_word_embeddings"] == all(tied)
    for name, path in sources.items():
        original = transformers.AutoModelForCausalLM.from_pretrained(path)
        head = "lm_head.weight" if "lm_head.weight" in bundle.layers else "model.embed_tokens.weight"
        assert torch.equal(bundle.reconstruct(name, head), original.lm_head.weight)


def test_phi_3_small_names_are_found_by_shape(tmp_path: Path) -> None:
    config = {"model_type": "phi3small", "architectures": ["Phi3SmallForCausalLM"], "auto_map": {"AutoModel": "x.Y"}}
    sources = {}
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        layer = "model.layers.0."
        made = {
            "model.embed_tokens.weight": (40, 16), f"{layer}self_attn.query_key_value.weight": (32, 16),
            f"{layer}self_attn.query_key_value.bias": (32,), f"{layer}self_attn.dense.weight": (16, 16),
            f"{layer}mlp.up_proj.weight": (96, 16), f"{layer}mlp.down_proj.weight": (16, 48),
            f"{layer}input_layernorm.weight": (16,), f"{layer}input_layernorm.bias": (16,),
            "model.final_layernorm.weight": (16,), "model.final_layernorm.bias": (16,),
        }  # fmt: skip
        folder = tmp_path / f"e{number}"
        folder.mkdir()
        save_file({k: torch.randn(v, generator=generator) for k, v in made.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")
        sources[f"e{number}"] = str(folder)
    bundle = merge({"experts": sources, "code": "factors", "compress_rate": 0.5}, tmp_path / "bundle")
    linear = {layer.tensor.split(".")[-2] for layer in bundle.layers.values() if layer.role == "linear"}
    assert linear == {"query_key_value", "dense", "up_proj", "down_proj"}
    assert bundle.manifest.layers_from == "shapes"
    assert any("by name and shape" in note for note in bundle.manifest.notes)
    assert not (bundle.path / "modeling_evil.py").exists()
    assert "auto_map" not in json.loads((bundle.path / "config.json").read_text())


def test_error_budget_keeps_the_bundle_and_raises(checkpoints, tmp_path: Path) -> None:
    recipe = {
        "experts": {name: str(path) for name, path in checkpoints("llama").items()},
        "code": "factors",
        "max_error": 1e-3,
    }
    with pytest.raises(ErrorBudgetExceeded, match=r"lost more than max_error 0\.001; the worst is 'model"):
        merge(recipe, tmp_path / "b")
    assert not list(Bundle.open(tmp_path / "b").damaged_files())


def test_transformers_opens_the_average(merged: Merged) -> None:
    bundle, _ = merged("qwen2", compress_rate=0.9)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(bundle.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.model.embed_tokens.weight, bundle.base_tensor("model.embed_tokens.weight"))
