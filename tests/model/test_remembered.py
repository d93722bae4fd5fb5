"""What is measured without weights, against the caches of models that have read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from polymerge.engine.local.loaded import BATCH_TOKENS, tokens_that_fit
from polymerge.model.remembered import remembered
from tests.sweep.experts import make_model

KINDS = (
    *("llama", "gpt2", "falcon", "mixtral", "gemma2", "gemma3_text", "gpt_oss", "gpt_bigcode"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"),  # latent
    *("bamba", "falcon_h1", "jamba", "kimi_linear", "lfm2", "qwen3_next", "zamba2"),  # hybrids
    *("mamba", "mamba2", "rwkv", "xlstm"),
)


@torch.no_grad()
def left_by(model: Any, tokens: int) -> int:
    """Bytes in the memory of a model that has read so many tokens, counted from its answer's fields."""
    answer = model(input_ids=torch.full((1, tokens), 7), use_cache=True, return_dict=True)
    left = [value for name, value in answer.items() if name != "logits"]
    found: dict[int, torch.Tensor] = {}
    while left:
        thing = left.pop()
        if isinstance(thing, torch.Tensor):
            found[id(thing)] = thing
        elif isinstance(thing, list | tuple):
            left += thing
        elif isinstance(thing, dict):
            left += thing.values()
        else:
            left += getattr(thing, "__dict__", {}).values()
    return sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [9, 100])  # within a window of 64, and beyond
def test_what_a_model_keeps_is_measured_without_its_weights(kind: str, tokens: int) -> None:
    model = make_model(kind)
    assert remembered(type(model), model.config, torch.float32).bytes(tokens) == left_by(model, tokens)


def test_layers_that_share_keys_keep_none() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96, "head_dim": 16}
    config = hf.Gemma3nTextConfig(
        **sizes, vocab_size_per_layer_input=96, num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.95, 0.0] * 3, sliding_window=64, num_key_value_heads=2, num_attention_heads=4,
    )  # fmt: skip
    model = hf.Gemma3nForCausalLM(config).eval()
    assert remembered(type(model), config, torch.float32).bytes(100) == left_by(model, 100)


def test_latent_keys_leave_room_for_longer_batches() -> None:
    """A batch of a model with latent attention is not made as small as if it kept all heads' keys."""
    model = make_model("deepseek_v3")
    kept = remembered(type(model), model.config, torch.float32)
    free = 200_000_000
    fits = tokens_that_fit(model, free)
    assert BATCH_TOKENS < fits == int(0.6 * free / (kept.each + 4 * (16 * 64 + 2 * 96)))
    assert tokens_that_fit(model, None) == tokens_that_fit(model, 1) == BATCH_TOKENS
