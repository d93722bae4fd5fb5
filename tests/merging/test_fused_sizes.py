"""A bundle of three takes at most 1.2 models for every fused mixture of experts at its real shapes.

From configurations alone: `plan` builds the architectures without weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from polymerge.merging.plan import plan_merge

_GRANITE_H = ["attention" if number in (5, 15, 25, 35) else "mamba" for number in range(40)]
# The settings that make sizes, as in the config.json of each.
REAL: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt-oss-20b": (
        hf.GptOssConfig,
        {"num_hidden_layers": 24, "num_local_experts": 32, "hidden_size": 2880, "intermediate_size": 2880},
    ),
    "gpt-oss-120b": (
        hf.GptOssConfig,
        {"num_hidden_layers": 36, "num_local_experts": 128, "hidden_size": 2880, "intermediate_size": 2880},
    ),
    "Llama-4-Scout-17B-16E": (
        hf.Llama4TextConfig,
        {
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 16,
            "interleave_moe_layer_step": 1,
            "vocab_size": 202048,
        },
    ),
    "granite-3.0-3b-a800m": (
        hf.GraniteMoeConfig,
        {
            "hidden_size": 1536,
            "intermediate_size": 512,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 40,
            "num_experts_per_tok": 8,
            "vocab_size": 49155,
            "tie_word_embeddings": True,
        },
    ),
    "granite-4.0-h-tiny": (
        hf.GraniteMoeHybridConfig,
        {
            "hidden_size": 1536,
            "intermediate_size": 512,
            "shared_intermediate_size": 1024,
            "num_hidden_layers": 40,
            "layer_types": _GRANITE_H,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "mamba_d_state": 128,
            "mamba_n_heads": 48,
            "vocab_size": 100352,
            "tie_word_embeddings": True,
        },
    ),
    "jetmoe-8b": (
        hf.JetMoeConfig,
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "kv_channels": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "tie_word_embeddings": True,
        },
    ),
    "Aria": (
        hf.AriaTextConfig,
        {
            "hidden_size": 2560,
            "intermediate_size": 1664,
            "num_hidden_layers": 28,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "moe_num_experts": 64,
            "moe_topk": 6,
            "moe_num_shared_experts": 2,
            "vocab_size": 100352,
        },
    ),
    "dbrx-base": (
        hf.DbrxConfig,
        {
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "vocab_size": 100352,
            "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
    ),
    "Mixtral-8x7B": (
        hf.MixtralConfig,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_local_experts": 8},
    ),
    "Qwen3-30B-A3B": (
        hf.Qwen3MoeConfig,
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
}
BILLIONS = {  # parameters, as their cards say
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "Llama-4-Scout-17B-16E": 108,
    "granite-3.0-3b-a800m": 3.3,
    "granite-4.0-h-tiny": 7,
    "jetmoe-8b": 8.5,
    "Aria": 24.9,
    "dbrx-base": 132,
    "Mixtral-8x7B": 46.7,
    "Qwen3-30B-A3B": 30.5,
}


@pytest.mark.slow
@pytest.mark.parametrize("code", ["factors", "int4"])
@pytest.mark.parametrize("model", REAL)
def test_three_real_mixtures_take_little_more_than_one(model: str, code: str, tmp_path: Path) -> None:
    kind, settings = REAL[model]
    kind(**settings, dtype="bfloat16").save_pretrained(tmp_path)
    recipe = {
        "experts": {name: f"org/{name}" for name in ("one", "two", "three")},
        "config": str(tmp_path),
        "compress_rate": 0.95,
        "code": code,
        "embeddings": "average",
        "lm_head": "average",
    }
    plan = plan_merge(recipe, weights=False)
    sizes = plan.summary()
    print(json.dumps({"model": model, "code": code, "share": sizes["write_bytes"] / sizes["base_bytes"]}))
    assert sizes["dtype"] == "bfloat16"
    assert abs(sizes["base_bytes"] / 2e9 / BILLIONS[model] - 1) < 0.05, "these are not the sizes of that model"
    assert sizes["write_bytes"] <= 1.2 * sizes["base_bytes"]
    compressed = sum(t.numel for t in plan.tasks if t.treatment == "low_rank")
    assert compressed > 0.85 * sum(task.numel for task in plan.tasks)
