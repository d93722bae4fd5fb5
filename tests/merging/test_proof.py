"""A merge proves its architecture first, and refuses what a bundle could not answer as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from polymerge import merge
from polymerge.errors import SourceError
from polymerge.merging import proof, small
from polymerge.model.own import OwnTensor
from tests.conftest import Merged
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")


def sources(experts: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in experts.items()}


def test_the_manifest_says_that_it_was_proved(merged: Merged) -> None:
    bundle, _ = merged("llama", compress_rate=0.6)
    assert "proved: LlamaForCausalLM, built small, answers a mixed batch (in layers)" in bundle.manifest.notes[-1]


@pytest.mark.parametrize("rate", [0.0, 0.9])
def test_a_bundle_that_would_answer_wrongly_is_not_written(
    rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = make_experts("llama", tmp_path, count=2)
    monkeypatch.setattr(OwnTensor, "of", lambda self, weights: self.home[self.name].detach())
    proof._proved.cache_clear()
    with pytest.raises(SourceError, match=r"LlamaForCausalLM: .*mixed batch.* off"):
        merge({"experts": sources(experts), "code": "factors", "compress_rate": rate}, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    proof._proved.cache_clear()


def test_what_cannot_be_built_small_is_merged_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "small_configs", lambda config, parameters: [{"model_type": "no such model"}])
    proof._proved.cache_clear()
    experts = make_experts("llama", tmp_path, count=2)
    bundle = merge({"experts": sources(experts), "code": "factors"}, tmp_path / "bundle")
    assert bundle.manifest.notes[-1].startswith("not proved: LlamaForCausalLM could not be built small")
    proof._proved.cache_clear()


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(num_key_value_heads=8),
        transformers.Qwen3MoeConfig(),
        transformers.Gemma3TextConfig(),
        transformers.GPT2Config(),
        transformers.DeepseekV3Config(),
        transformers.Qwen3NextConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_a_real_configuration_becomes_a_small_one_with_every_kind_of_layer(config: Any) -> None:
    made = next(small.small_configs(json.loads(json.dumps(config.to_dict(), default=str)), 10**10))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**made))
    assert sum(parameter.numel() for parameter in model.parameters()) < small.ENOUGH
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    kinds = getattr(config, "layer_types", None)
    assert kinds is None or set(model.config.layer_types) == set(kinds)


# As Qwen2.5-VL-7B's config.json was published; Qwen2-VL's tower says `embed_dim`.
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    },
    "qwen2_vl": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584, "patch_size": 14,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", VISION)
def test_a_published_model_of_images_is_proved(kind: str, tmp_path: Path) -> None:
    """Positions on three axes: their sections are made narrow with the heads."""
    published = {
        "model_type": kind, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "max_window_layers": 28, "sliding_window": 32768,
        "use_sliding_window": False, "rope_theta": 1000000.0, "vocab_size": 152064, "max_position_embeddings": 128000,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": VISION[kind],
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(**published)
    made = next(small.small_configs(json.loads(json.dumps(config.to_dict(), default=str)), 10**10))
    assert made["text_config"]["rope_parameters"]["mrope_section"] == [2, 3, 3]
    experts = proof.random_experts(made, tmp_path)
    bundle = merge({"experts": sources(experts), "code": "factors", "compress_rate": 0.0}, tmp_path / "bundle")
    assert bundle.manifest.notes[-1].startswith("proved: Qwen2")


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    for name in "ab":
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
    with pytest.raises(SourceError, match=r"T5ForConditionalGeneration \(t5\) is an encoder-decoder"):
        merge({"experts": {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}, "code": "factors"}, tmp_path / "bundle")


def test_a_classifier_is_refused_by_name(tmp_path: Path) -> None:
    for name in "ab":
        config = transformers.LlamaConfig(**COMMON, tie_word_embeddings=True)
        transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / name)
    with pytest.raises(SourceError, match=r"LlamaForSequenceClassification \(llama\) is a classifier"):
        merge({"experts": {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}, "code": "factors"}, tmp_path / "bundle")


def test_an_unknown_tensor_that_differs_is_refused(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=2)
    for path in experts.values():
        file = path / "model.safetensors"
        save_file(load_file(file) | {"model.value_head": torch.randn(3)}, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"'model.value_head' is unknown to its architecture"):
        merge({"experts": sources(experts), "code": "factors"}, tmp_path / "bundle")


def test_a_trained_head_beside_tied_embeddings_is_kept(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=2)
    for path in experts.values():
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    bundle = merge({"experts": sources(experts), "code": "factors", "compress_rate": 0.0}, tmp_path / "bundle")
    assert bundle.manifest.tied_embedding is None
    for name, path in experts.items():
        original = load_file(path / "model.safetensors")["lm_head.weight"]
        assert torch.equal(bundle.reconstruct(name, "lm_head.weight"), original)
