"""Synthetic checkpoints with the shapes of Llama-3-8B: what the merge's speed and memory are measured on.

Only sizes matter here, no accuracy is claimed from them. A fine-tuned weight is base + difference, where the
difference has what real residuals have: a slowly falling spectrum (a product of two Gaussian matrices whose inner
dimensions are weighted by 1 / sqrt(k)) over a floor of white noise. The same pattern is shifted for every layer, so
that writing 8 GB of random numbers does not take longer than merging them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 4096, 14336, 1024, 128256
INNER = 512  # dimensions of the difference that stand out of its noise
SHARD_TENSORS = 9  # a decoder layer a shard

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def checkpoint_bytes(layers: int) -> int:
    """Bytes of one checkpoint in bfloat16."""
    linear = sum(rows * columns for rows, columns in LINEAR.values())
    return 2 * (layers * (linear + 2 * HIDDEN) + 2 * VOCABULARY * HIDDEN + HIDDEN)


def write_checkpoint(folder: Path, layers: int, expert: int) -> None:
    """One expert's checkpoint, sharded, without ever holding more than a shard."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    weight_map: dict[str, str] = {}
    shards = list(_shards(layers, expert))
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor(name, expert) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": checkpoint_bytes(layers)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(layers: int, expert: int) -> Iterator[list[str]]:
    yield ["model.embed_tokens.weight"]
    yield ["lm_head.weight", "model.norm.weight"]
    for layer in range(layers):
        linear = [f"model.layers.{layer}.{module}.weight" for module in LINEAR]
        norms = ["input_layernorm", "post_attention_layernorm"]
        yield [*linear, *(f"model.layers.{layer}.{norm}.weight" for norm in norms)]


def tensor(name: str, expert: int) -> Tensor:
    """One tensor of one expert, bfloat16. Norms are the same for all."""
    if "norm" in name:
        return torch.ones(HIDDEN, dtype=torch.bfloat16)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        shared = _noise(VOCABULARY, HIDDEN, seed=len(name)).mul_(0.02)
        return shared.add_(_noise(VOCABULARY, HIDDEN, seed=len(name) + 100 * (expert + 1)), alpha=1e-4).bfloat16()
    layer, module = int(name.split(".")[2]), ".".join(name.split(".")[3:5])
    rows, columns = LINEAR[module]
    weight = _noise(rows, columns, seed=layer * 100 + len(module)).mul_(0.02)
    return weight.add_(difference(rows, columns, seed=expert * 1000 + layer)).bfloat16()


def difference(rows: int, columns: int, seed: int) -> Tensor:
    """What fine-tuning added: [rows, columns], about 2% of the weight's norm."""
    falling = torch.arange(1, INNER + 1).rsqrt()
    left = _noise(rows, INNER, seed) * falling
    right = _noise(INNER, columns, seed + 1)
    return (left @ right).mul_(1e-4).add_(_noise(rows, columns, seed + 2), alpha=1e-4)


def _noise(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian numbers; a few rows are drawn and rolled for the rest where there are many."""
    generator = torch.Generator().manual_seed(seed)
    if rows * columns <= 2**24:
        return torch.randn(rows, columns, generator=generator)
    block = torch.randn(1024, columns, generator=generator)
    parts = [torch.roll(block, (7 * number, 131 * number), (0, 1)) for number in range(-(-rows // 1024))]
    return torch.cat(parts)[:rows]
