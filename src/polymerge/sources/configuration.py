"""What a configuration says: the settings that make a model what it is, with its architecture's defaults filled in, and
the positions apart from them.

Two sets of weights are one model's only if all settings agree but those that cannot change what a forward pass gives.
Positions (rope) are apart because a bundle holds them for every expert. Knows keys; does not know weights or bundles.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# How positions become numbers, and how far they go. Old keys stand beside `rope_parameters` where no class of
# transformers has put them there.
POSITIONS = (
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
    "partial_rotary_factor", "max_position_embeddings", "original_max_position_embeddings",
)  # fmt: skip
# What cannot change a forward pass of a causal model in evaluation, or is another's concern: tying and the size of the
# vocabulary are seen on the tensors, architectures are compared by name, dtypes and quantisation are the files'.
CANNOT_MATTER = re.compile(
    r"_.*|.*dropout.*|.*_pdrop|.*layerdrop|.*initializer.*|init_.*|.*_token_ids?|.*_token_index|.*aux_loss.*|.*z_loss.*"
    r"|output_(attentions|hidden_states|router_logits|scores|past)|return_dict|use_return_dict|use_cache|id2label|label2id|num_labels|problem_type|finetuning_task"
    r"|task_specific_params|summary_.*|architectures|auto_map|name_or_path|transformers_version|unsloth.*"
    r"|torch_dtype|dtype|use_bfloat16|torchscript|quantization_config|compression_config|vocab_size"
    r"|tie_word_embeddings|gradient_checkpointing|pretraining_tp|chunk_size_feed_forward|attn_implementation"
    r"|model_max_length|transformers\.js_config"
)
# Sizes that the tensors' shapes and names show, or that nothing is made of.
SHOWN_BY_SHAPES = ("hidden_size", "intermediate_size", "num_hidden_layers", "n_embd", "n_layer", "n_inner")
# Ways to say which layers slide, where the configuration says it layer by layer as well.
SAID_BY_LAYERS = ("use_sliding_window", "max_window_layers", "sliding_window_pattern")

# Ignored, though some count positions from it: what it does there is tried (`polymerge.merging.padding`).
PADDING = "pad_token_id"

Settings = dict[str, Any]


def resolved(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as transformers understands it; as it stands where its type is not known."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception:  # an unknown model type, or values that its class refuses
        return dict(raw)
    understood: dict[str, Any] = config.to_dict()
    return understood


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Every setting that changes a forward pass, without positions: dotted key -> value."""
    return {key: value for key, value in _leaves(config) if key.rpartition(".")[2] not in POSITIONS}


def paddings_of(config: Mapping[str, Any], prefix: str = "") -> Settings:
    """Its padding tokens: dotted key -> token."""
    paddings: Settings = {}
    for key, value in config.items():
        if key == PADDING:
            paddings[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            paddings |= paddings_of(value, f"{prefix}{key}.")
    return paddings


def positions_of(config: Mapping[str, Any]) -> Settings:
    """What it says of positions: dotted key -> value."""
    return dict(_positions(config, ""))


def first_difference(one: Settings, other: Settings) -> str | None:
    """The first key at which two differ; a key that one lacks is None there."""
    keys = dict.fromkeys(["model_type", *one, *other])
    return next((key for key in keys if not _same(one.get(key), other.get(key))), None)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    by_layers = SAID_BY_LAYERS if config.get("layer_types") else ()
    said = {str(key): value for key, value in config.items()}  # some have tables by number (Aria)
    for key, value in {**said, **_derived(config)}.items():
        if key in by_layers or key in SHOWN_BY_SHAPES or CANNOT_MATTER.fullmatch(key):
            continue
        if isinstance(value, Mapping) and key not in POSITIONS:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _derived(config: Mapping[str, Any]) -> dict[str, Any]:
    """What stands for a null in every architecture that allows one."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    derived: dict[str, Any] = {}
    if isinstance(heads, int) and heads and isinstance(width, int) and config.get("head_dim") is None:
        derived["head_dim"] = width // heads
    if isinstance(heads, int) and config.get("num_key_value_heads") is None:
        derived["num_key_value_heads"] = heads
    return derived


def _positions(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in POSITIONS:
            yield f"{prefix}{key}", _without_old_names(value)
        elif isinstance(value, Mapping):
            yield from _positions(value, f"{prefix}{key}.")


def _without_old_names(value: Any) -> Any:
    """Rope settings with `rope_type`, which was once called `type`, said once."""
    if not isinstance(value, Mapping):
        return value
    plain = {key: _without_old_names(part) for key, part in value.items() if part is not None}
    if "rope_type" in plain:
        plain.pop("type", None)
    return plain


def _same(one: Any, other: Any) -> bool:
    return bool(_single(one) == _single(other)) or (one in (None, False) and other in (None, False))


def _single(value: Any) -> Any:
    """A number as a forward pass takes it. A GGUF file holds 1e-05 in 32 bits, which transformers and what was trained
    from it then call 9.999999747378752e-06."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0] if isinstance(value, float) else value
    except OverflowError:
        return value
