"""An expert as PEFT's adapter: PEFT itself reads the settings, the patterns and the keys as they are meant."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from polymerge import load_model
from polymerge.bundle.layer import BundleLayer
from polymerge.bundle.peft import (
    PEFT_PREFIX,
    TIED_ROWS,
    adapter_config,
    adapter_name,
    is_fused,
    missing_siblings,
    missing_zeros,
    stored_name,
)
from tests.conftest import Merged

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def layer(module: str, role: str, *shape: int, parameter: str = "weight", transposed: bool = False) -> BundleLayer:
    return BundleLayer(
        tensor=f"{module}.{parameter}",
        module=module,
        parameter=parameter,
        role=role,  # type: ignore[arg-type]
        transposed=transposed,
        shape=shape,
        rank=0,
        mean_scale=1.0 if role == "linear" else None,
    )


def factors(module: str, rank: int, rows: int = 8, columns: int = 6) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{module}.lora_A.weight", (rank, columns)), (f"{module}.lora_B.weight", (rows, rank))]


LAYERS = [layer(f"m.{n}.up", "linear", 8, 6) for n in (0, 1, 10)] + [layer("m.norm", "norm", 6)]


# PEFT has no place for the ratios of published bundles; with `scale: shared` it must say the same to rounding.
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "gpt2", "gpt-neox", "gemma3", "phi3"])
@pytest.mark.parametrize("rate", [0.0, 0.7])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # PEFT, of layers whose bias is none but zeros
def test_peft_says_the_same_as_the_bundle(merged: Merged, architecture: str, rate: float) -> None:
    bundle, _ = merged(architecture, compress_rate=rate, scale="shared")
    base = AutoModelForCausalLM.from_pretrained(bundle.path)
    adapted = PeftModel.from_pretrained(base, bundle.expert_folder("e1")).eval()
    with torch.no_grad():
        expected = load_model(bundle)(IDS, experts="e1").logits
        torch.testing.assert_close(adapted(IDS).logits, expected, atol=2e-5, rtol=0)


def test_the_commonest_rank_is_the_general_one_and_the_others_have_patterns() -> None:
    tensors = factors("m.0.up", 4) + factors("m.1.up", 2) + factors("m.10.up", 4)
    config = adapter_config(tensors, LAYERS, tied_embedding=None)
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {"m\\.1\\.up": 2}
    assert config["target_modules"] == ["m.0.up", "m.1.up", "m.10.up"]
    read = LoraConfig(**{key: value for key, value in config.items() if key not in ("peft_type", "lora_bias")})
    assert read.lora_alpha / read.r == 1


def test_patterns_are_exact_under_pefts_rule() -> None:
    tensors = factors("m.1.up", 2) + factors("m.10.up", 4) + factors("m.0.up", 4)
    pattern = adapter_config(tensors, LAYERS, tied_embedding=None)["rank_pattern"]
    matched = [
        n for n in ("m.1.up", "m.10.up", "mx1.up", "m.11up") if any(re.match(rf"(.*\.)?({k})$", n) for k in pattern)
    ]
    assert matched == ["m.1.up"]


def test_an_adapter_without_factors_targets_nothing() -> None:
    config = adapter_config([("m.norm.weight", (6,))], LAYERS, tied_embedding=None)
    assert config["target_modules"] == "dummy-target-modules" and config["modules_to_save"] == ["m.norm"]
    assert config["r"] == 1 and config["rank_pattern"] == {}


def test_a_tied_embedding_is_kept_as_token_rows() -> None:
    layers, tensors = [layer("m.embed", "embedding", 5, 3)], [("m.embed.weight", (5, 3))]
    config = adapter_config(tensors, layers, tied_embedding="m.embed")
    assert config["trainable_token_indices"] == {"m.embed": [0, 1, 2, 3, 4]} and config["modules_to_save"] is None
    stored = stored_name("m.embed.weight", {"m.embed"})
    assert stored == f"{PEFT_PREFIX}m.embed{TIED_ROWS}" and adapter_name(stored) == "m.embed.weight"
    assert adapter_config(tensors, layers, tied_embedding=None)["modules_to_save"] == ["m.embed"]
    assert stored_name("m.embed.weight", ()) == f"{PEFT_PREFIX}m.embed.weight"


def test_one_bias_brings_biases_and_factors_of_zeros_everywhere() -> None:
    shapes = dict(factors("m.0.up", 4))
    assert missing_zeros(shapes, LAYERS) == []
    assert not adapter_config(shapes.items(), LAYERS, tied_embedding=None)["lora_bias"]
    shapes["m.1.up.lora_B.bias"] = (8,)
    added = {zeros.key: zeros.shape for zeros in missing_zeros(shapes, LAYERS)}
    assert added == {"m.0.up.lora_B.bias": (8,), "m.1.up.lora_A.weight": (1, 6), "m.1.up.lora_B.weight": (8, 1)}
    config = adapter_config({**shapes, **added}.items(), LAYERS, tied_embedding=None)
    assert config["lora_bias"] and config["target_modules"] == ["m.0.up", "m.1.up"]


def test_the_order_of_tensors_does_not_matter_to_the_configuration() -> None:
    tensors = [pair for n, rank in ((10, 2), (1, 4), (0, 3)) for pair in factors(f"m.{n}.up", rank)]
    config = adapter_config(tensors, LAYERS, tied_embedding=None)
    assert config["r"] == 3 and list(config["rank_pattern"]) == [r"m\.1\.up", r"m\.10\.up"]
    assert json.dumps(config) == json.dumps(adapter_config(tensors[::-1], LAYERS, tied_embedding=None))


def test_an_own_weight_brings_the_modules_other_parameters() -> None:
    layers = [layer("n", "norm", 6), layer("n", "norm", 6, parameter="bias"), layer("o", "norm", 6)]
    assert [one.tensor for one in missing_siblings(["n.weight"], layers)] == ["n.bias"]
    assert [one.tensor for one in missing_siblings(["n.bias"], layers)] == ["n.weight"]
    assert missing_siblings(["n.bias", "n.weight", "o.weight"], layers) == []
    assert missing_siblings(["n.lora_A.weight"], layers) == []


def test_matrices_of_fused_blocks_rule_the_rank_and_whole_ones_are_refused_by_their_type() -> None:
    blocks = [layer(f"m.0.mlp.experts.{n}.w1", "linear", 8, 6) for n in range(2)]
    # a matrix of a fused parameter has no module: the checkpoint's name without `.weight`
    assert all(is_fused(block) for block in blocks) and not is_fused(LAYERS[0])
    tensors = factors("m.0.up", 4) + factors("m.1.up", 4) + factors("m.10.up", 4) + factors(blocks[0].module, 2)
    config = adapter_config(tensors, [*LAYERS, *blocks], tied_embedding=None)
    assert config["r"] == 2 and config["peft_type"] == "LORA"
    whole = adapter_config([(f"{blocks[0].module}.weight", (8, 6))], blocks, tied_embedding=None)
    assert whole["peft_type"] == "POLYMERGE_WHOLE_BLOCKS"
    with pytest.raises((ValueError, KeyError)):
        LoraConfig.from_peft_type(**whole)


def test_a_transposed_weight_makes_peft_transpose(merged: Merged) -> None:
    assert adapter_config([], [layer("m", "linear", 6, 8, transposed=True)], tied_embedding=None)["fan_in_fan_out"]
    bundle, _ = merged("gpt2", compress_rate=0.7, scale="shared")
    stored = load_file(Path(bundle.expert_folder("e0")) / "adapter_model.safetensors")
    a = stored[f"{PEFT_PREFIX}transformer.h.0.mlp.c_fc.lora_A.weight"]
    assert a.shape[1] == 48  # [r, in], though the base has [in, out]
