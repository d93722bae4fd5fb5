"""A small model of the same architecture: a configuration whose sizes are made small by their names.

Knows names of settings. What comes out may not fit together; whoever builds it finds out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

# A model of at most so many parameters is small enough as it is.
ENOUGH = 5_000_000
MOST_LAYERS = 8
# Names of settings and what they become where they are larger.
SIZES: dict[int, str] = {
    64: "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim lru_width attention_hidden_size "
    "embed_dim out_hidden_size projector_input_dim projector_output_dim vision_output_dim",
    96: "intermediate_size ffn_dim d_ff decoder_ffn_dim n_inner ffn_hidden_size dense_intermediate_size "
    "intermediate_size_mlp",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size",
    16: "head_dim kv_channels v_head_dim qk_nope_head_dim q_lora_rank kv_lora_rank linear_key_head_dim "
    "linear_value_head_dim mamba_head_dim mamba_d_head global_head_dim index_head_dim hidden_size_per_layer_input",
    8: "qk_rope_head_dim rotary_dim ssm_state_size state_size mamba_d_state mamba_num_heads mamba_n_heads",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k linear_num_key_heads",
    1: "n_group topk_group first_k_dense_replace num_dense_layers n_shared_experts mamba_n_groups n_groups",
    128: "mamba_d_ssm",
    256: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions max_target_positions n_ctx",
}
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "linear_num_value_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth")
DROPPED = ("quantization_config", "_name_or_path", "torch_dtype", "dtype", "auto_map")


def small_configs(config: dict[str, Any], parameters: int) -> Iterator[dict[str, Any]]:
    """Configurations to try, the likeliest first; the last resort is one that is narrow in nothing but its depth."""
    plain = {name: value for name, value in config.items() if name not in DROPPED}
    if parameters <= ENOUGH:
        yield plain
        return
    yield _shrunk(plain, narrow=True)
    yield _shrunk(plain, narrow=False)


def _shrunk(config: dict[str, Any], *, narrow: bool) -> dict[str, Any]:
    made = copy.deepcopy(config)
    total = next((made[name] for name in LAYERS if isinstance(made.get(name), int)), 0)
    kept = _kept_layers(made, total)
    _cut_lists(made, total, kept)
    for name in LAYERS:
        if isinstance(made.get(name), int):
            made[name] = min(made[name], len(kept))
    if narrow:
        _narrow(made)
    _fit_tokens(made)
    for name, inner in made.items():  # the text model of a larger one, and its tower of images
        if isinstance(inner, dict) and any(layers in inner for layers in LAYERS):
            made[name] = _shrunk(inner, narrow=narrow)
    return made


def _kept_layers(config: dict[str, Any], total: int) -> list[int]:
    """Numbers of layers among which every kind is."""
    lists = [value for value in config.values() if isinstance(value, list) and value]
    kinds = [tuple(json.dumps(value[n]) for value in lists if len(value) == total) for n in range(total)]
    kept = {kinds.index(kind) for kind in kinds}
    for name, value in config.items():  # [9, 18, 27]: the layers that have attention
        if "layer" in name and isinstance(value, list) and value and len(value) != total and _are_numbers(value):
            kept.add(min(value))
        if name.endswith(("_period", "_interval", "_step")) and type(value) is int and value <= MOST_LAYERS:
            kept |= set(range(value))
    kept &= set(range(total))
    more = [number for number in range(total) if number not in kept]
    return sorted([*sorted(kept)[:MOST_LAYERS], *more[: max(0, 2 - len(kept))]])


def _cut_lists(config: dict[str, Any], total: int, kept: list[int]) -> None:
    if not total:  # a model around others
        return
    place = {number: n for n, number in enumerate(kept)}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == total:
            config[name] = [value[number] for number in kept]
        elif isinstance(value, list) and value and "layer" in name and _are_numbers(value):
            config[name] = [place[number] for number in value if number in place]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # layer -> settings
            config[name] = {str(place[int(key)]): part for key, part in value.items() if int(key) in place}


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _narrow(config: dict[str, Any]) -> None:
    width = _head_width(config)
    heads = next((config[name] for name in HEADS if isinstance(config.get(name), int)), 4)
    if "head_dim" in config and config["head_dim"] == config.get("qk_rope_head_dim"):  # of the rotated part alone
        config["head_dim"] = 8
    for size, names in SIZES.items():
        for name in names.split():
            if type(config.get(name)) is int and config[name] > size:
                config[name] = size
    for name in HEADS:
        if isinstance(config.get(name), int):
            config[name] = min(config[name], 4)
    for name in KEY_HEADS:
        if isinstance(config.get(name), int):
            config[name] = max(1, min(4, config[name] * 4 // max(4, heads)))
    if isinstance(config.get("expand"), int) and type(config.get("num_heads")) is int:  # Mamba 2
        config["num_heads"] = config["expand"] * config.get("hidden_size", 64) // config.get("head_dim", 16)
    if type(config.get("qk_head_dim")) is int:
        config["qk_head_dim"] = config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0)
    _fit_sections(config, width)


def _head_width(config: dict[str, Any]) -> int:
    heads = next((config[name] for name in HEADS if isinstance(config.get(name), int)), 0)
    width = config.get("head_dim") or (config.get("hidden_size") or 0) // max(1, heads)
    return int(width) if isinstance(width, int) else 0


def _fit_sections(config: dict[str, Any], width: int) -> None:
    """The parts of a head that are turned by each axis of an image's positions, as large a share as before."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        sections = rope.get("mrope_section") if isinstance(rope, dict) else None
        if not (isinstance(rope, dict) and isinstance(sections, list) and sections and width):
            continue
        total = sum(sections) * _head_width(config) // width
        fitted = [size * total // sum(sections) for size in sections]
        rope["mrope_section"] = [fitted[0] + total - sum(fitted), *fitted[1:]]


def _fit_tokens(config: dict[str, Any]) -> None:
    """Special tokens lie within the vocabulary."""
    size = config.get("vocab_size")
    for name, value in config.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(size, int):
            ids = value if isinstance(value, list) else [value]
            if any(isinstance(number, int) and number >= size for number in ids):
                config[name] = 1
