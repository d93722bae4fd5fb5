"""Tensors that a checkpoint, or its architecture, keeps in another dtype than the rest stay in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from polymerge import Bundle, add_expert, export_dense, load_model, merge, remove_expert, verify
from polymerge.errors import SourceError
from tests.sweep.configs import tiny_config
from tests.tiny import make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = ("norm", "lm_head")  # in float32, in a checkpoint in bfloat16


def mixed(folder: Path, count: int = 2, **save: Any) -> dict[str, Path]:
    """Checkpoints in bfloat16 whose norms and heads are in float32, with digits that bfloat16 does not hold."""
    experts = make_experts("llama", folder, count=count, **save)
    for path in experts.values():
        tensors = load_file(path / "model.safetensors")
        kept = {name: value if any(w in name for w in WIDE) else value.bfloat16() for name, value in tensors.items()}
        save_file(kept, path / "model.safetensors", {"format": "pt"})
    return experts


def merged(experts: dict[str, Path], folder: Path, **recipe: Any) -> Bundle:
    return merge({"experts": {name: str(path) for name, path in experts.items()}, **recipe}, folder / "bundle")


def check_exact(folder: Path, original: Path) -> None:
    exported, expected = (load_file(path / "model.safetensors") for path in (folder, original))
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        assert exported[name].dtype == value.dtype, name
        assert torch.equal(exported[name], value), name


def test_at_rate_0_a_checkpoint_of_many_dtypes_comes_back_bit_for_bit(tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    bundle = merged(experts, tmp_path, compress_rate=0.0)
    assert bundle.manifest.dtype == "bfloat16" and bundle.manifest.format_version == 3
    wide = {layer.tensor for layer in bundle.manifest.layers if layer.dtype == "float32"}
    assert wide == {name for name in bundle.layers if any(w in name for w in WIDE)}
    for name, path in experts.items():
        check_exact(export_dense(bundle, name, tmp_path / "exported" / name), path)
    assert verify(bundle, sources=True).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_dtype_needs_no_new_format(tmp_path: Path, dtype: torch.dtype) -> None:
    experts = make_experts("llama", tmp_path, count=2, dtype=dtype)
    bundle = merged(experts, tmp_path, compress_rate=0.0)
    assert bundle.manifest.format_version == 1 and not any(layer.dtype for layer in bundle.manifest.layers)
    for name, path in experts.items():
        check_exact(export_dense(bundle, name, tmp_path / "exported" / name), path)


def test_compressed_and_averaged_tensors_keep_it_too(tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    bundle = merged(experts, tmp_path, compress_rate=0.6, norms="average", lm_head="average")
    stored = load_file(bundle.path / "model.safetensors")
    norms = [load_file(path / "model.safetensors")["model.norm.weight"] for path in experts.values()]
    assert stored["model.norm.weight"].dtype == torch.float32
    torch.testing.assert_close(stored["model.norm.weight"], torch.stack(norms).mean(0))
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_an_expert_of_many_dtypes_is_added_and_taken_out(tmp_path: Path) -> None:
    experts = mixed(tmp_path, count=3)
    plain = make_experts("llama", tmp_path / "plain", count=1, seed=3, dtype=torch.bfloat16)
    bundle = merged({"e0": experts["e0"], "e1": experts["e1"]}, tmp_path, compress_rate=0.0)
    grown = add_expert(add_expert(bundle, "e2", experts["e2"]).bundle, "plain", plain["e0"]).bundle
    check_exact(export_dense(grown, "e2", tmp_path / "e2"), experts["e2"])
    check_exact(export_dense(grown, "plain", tmp_path / "p"), plain["e0"])
    assert verify(grown, sources=True).ok
    assert remove_expert(grown, "e2").manifest.format_version == 3


def test_a_narrow_bundle_takes_a_wide_norm_whole(tmp_path: Path) -> None:
    plain = make_experts("llama", tmp_path / "plain", count=2, seed=3, dtype=torch.bfloat16)
    wide = mixed(tmp_path, count=1)["e0"]
    bundle = add_expert(merged(plain, tmp_path, compress_rate=0.0), "wide", wide).bundle
    check_exact(export_dense(bundle, "wide", tmp_path / "wide"), wide)
    assert verify(bundle, sources=True).ok


def test_what_an_architecture_computes_in_float32_stays_so_when_the_rest_is_narrowed(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3")
    experts = make_experts("deepseek", tmp_path, count=2, config=config)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for number, path in enumerate(experts.values()):
        tensors = load_file(path / "model.safetensors")
        tensors[bias] = torch.tensor([0.1, 0.2, 0.3, 0.4001]) * (number + 1)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    bundle = merged(experts, tmp_path, compress_rate=0.0, dtype="bfloat16")
    assert [layer.tensor for layer in bundle.manifest.layers if layer.dtype] == [bias]
    for name, path in experts.items():
        expected = load_file(path / "model.safetensors")[bias]
        assert torch.equal(bundle.reconstruct(name, bias), expected)
        model = load_model(bundle, device="cpu", dtype="bfloat16")
        original = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(model(ids, experts=name).logits, original(ids).logits, rtol=0.05, atol=0.05)


def test_experts_in_different_dtypes_need_the_recipe_s_word(tmp_path: Path) -> None:
    wide = make_experts("llama", tmp_path / "wide", count=1)["e0"]
    narrow = make_experts("llama", tmp_path / "narrow", count=1, dtype=torch.bfloat16)["e0"]
    with pytest.raises(SourceError, match="wide: float32, narrow: bfloat16"):
        merged({"wide": wide, "narrow": narrow}, tmp_path)
    bundle = merged({"wide": wide, "narrow": narrow}, tmp_path, dtype="float32")
    assert not any(layer.dtype for layer in bundle.manifest.layers)
