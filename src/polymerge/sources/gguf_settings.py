"""What a GGUF file says of its model's forward beside the weights: set in transformers' configuration, or refused.

transformers takes some of these settings and leaves out the others without a word: scaled positions, soft caps,
windows. Knows GGUF's keys and the configurations' names for them; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import SourceError

_EPSILON = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
# Settings under the names that transformers' configurations have for them; the first that a configuration has counts.
NAMES: Mapping[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads",),
    "attention.layer_norm_epsilon": _EPSILON,
    "attention.layer_norm_rms_epsilon": _EPSILON,
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "use_parallel_residual": ("use_parallel_residual",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.dt_b_c_rms": (),
}
# Sizes that the shapes of the tensors show; how long texts may be; what nothing is made of.
SHOWN = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "expert_count",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "embedding_length_per_layer_input",
    "tensor_data_layout", "rope.scaling.finetuned", "attention.causal",
}  # fmt: skip
HEADS = {
    "attention.head_count_kv",
    *(f"attention.{kind}_length{swa}" for kind in ("key", "value") for swa in ("", "_swa")),
}
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
BASE, BASE_SLIDING = "rope.freq_base", "rope.freq_base_swa"
ROTATED, ROTATED_SLIDING = "rope.dimension_count", "rope.dimension_count_swa"
SCALING, FACTOR, LENGTH = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
# YaRN's own beside these, under transformers' names.
YARN = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_attn_factor": "attention_factor",
}
GATING, GATES = "expert_gating_func", {1: "softmax", 2: "sigmoid"}
# Of llama.cpp, which has this in no file: the models whose queries are scaled by width over heads, by their layers.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}


def put_settings(fields: Mapping[str, Any], config: Any, label: str) -> None:
    """Sets in the configuration what the file says, where transformers did not.

    Raises:
        SourceError: it says something that the configuration has no place for.
    """
    prefix = f"{fields.get('general.architecture')}."
    said = {key.removeprefix(prefix): _plain(value) for key, value in fields.items() if key.startswith(prefix)}
    try:
        _put_named(said, config)
        _put_heads(said, config)
        _put_window(said, config)
        _put_positions(said, config)
        _put_gates(said, config)
        _put_query_scale(config)
        known = {*NAMES, *SHOWN, *HEADS, *YARN, WINDOW, PATTERN, BASE, BASE_SLIDING, ROTATED, ROTATED_SLIDING, SCALING,
                 FACTOR, LENGTH, GATING}  # fmt: skip
        for key in said.keys() - known:
            _refuse_unless(not said[key], key)
    except _NoPlaceError as error:
        key = str(error)
        raise SourceError(
            f"{label}: {prefix}{key} is {said[key]}, which transformers' {type(config).__name__} has no place for; "
            "give the model's own folder instead"
        ) from None


class _NoPlaceError(Exception):
    """Of a setting, by its key."""


def _refuse_unless(met: bool, key: str) -> None:
    if not met:
        raise _NoPlaceError(key)


def _plain(value: Any) -> Any:
    """A float as it was written before the file rounded it: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _put_named(said: Mapping[str, Any], config: Any) -> None:
    for key in NAMES.keys() & said.keys():
        name = next((name for name in NAMES[key] if hasattr(config, name)), None)
        _refuse_unless(name is not None or not said[key], key)
        if name is not None and said[key] != getattr(config, name):
            setattr(config, name, said[key])


def _put_heads(said: Mapping[str, Any], config: Any) -> None:
    """How many values a head has, and how many heads of keys there are; per layer where these differ."""
    both = hasattr(config, "global_head_dim")
    for key in HEADS & said.keys():
        name = "global_head_dim" if both and not key.endswith("_swa") else "head_dim"
        name = "num_key_value_heads" if key == "attention.head_count_kv" else name
        values = {value for value in _list(said[key]) if value}
        if getattr(config, name, None) is not None:
            _refuse_unless(values <= {getattr(config, name)}, key)
        elif name == "head_dim":
            _refuse_unless(values <= {_head_size(config)}, key)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _put_window(said: Mapping[str, Any], config: Any) -> None:
    if PATTERN in said and getattr(config, "layer_types", None):
        layers, pattern = config.num_hidden_layers, said[PATTERN]
        slides = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in range(layers)]
        config.layer_types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    elif PATTERN in said:
        raise _NoPlaceError(PATTERN)
    if WINDOW in said:
        window, kinds = said[WINDOW], getattr(config, "layer_types", None)
        _refuse_unless(not window or hasattr(config, "sliding_window"), WINDOW)
        _refuse_unless(not kinds or ("sliding_attention" in kinds) == bool(window), WINDOW)
        if hasattr(config, "sliding_window"):
            config.sliding_window = window or None


def _put_positions(said: Mapping[str, Any], config: Any) -> None:
    settings = getattr(config, "rope_parameters", None) or {}
    full, sliding = settings.get("full_attention", settings), settings.get("sliding_attention")
    if BASE in said:
        _refuse_unless(bool(full), BASE)
        full["rope_theta"] = said[BASE]
    if BASE_SLIDING in said:
        _refuse_unless(sliding is not None or said[BASE_SLIDING] == full.get("rope_theta"), BASE_SLIDING)
        if sliding is not None:
            sliding["rope_theta"] = said[BASE_SLIDING]
    _put_rotated(said, config, full)
    _put_scaling(said, config, full)


def _put_rotated(said: Mapping[str, Any], config: Any, settings: dict[str, Any]) -> None:
    """How many of a head's values turn with the position."""
    if ROTATED_SLIDING in said:
        _refuse_unless(said[ROTATED_SLIDING] == _head_size(config), ROTATED_SLIDING)
    if ROTATED not in said or hasattr(config, "rotary_dim"):
        return
    size = getattr(config, "global_head_dim", None) or _head_size(config)
    if int(size * settings.get("partial_rotary_factor", 1.0)) != said[ROTATED]:
        _refuse_unless("partial_rotary_factor" in settings, ROTATED)
        settings["partial_rotary_factor"] = said[ROTATED] / size
        _refuse_unless(int(size * settings["partial_rotary_factor"]) == said[ROTATED], ROTATED)


def _put_scaling(said: Mapping[str, Any], config: Any, settings: dict[str, Any]) -> None:
    """Positions beyond those that the model was trained with."""
    kind = said.get(SCALING, "none")
    if kind == "none":
        return
    _refuse_unless(kind in ("linear", "yarn") and FACTOR in said and bool(settings), SCALING)
    settings |= {"rope_type": kind, "factor": said[FACTOR]}
    if kind == "yarn":
        settings["original_max_position_embeddings"] = said.get(LENGTH, config.max_position_embeddings)
        settings |= {name: said[key] for key, name in YARN.items() if key in said}


def _put_gates(said: Mapping[str, Any], config: Any) -> None:
    if GATING in said:
        gate = GATES.get(said[GATING])
        _refuse_unless(gate is not None and gate == getattr(config, "scoring_func", "softmax"), GATING)


def _put_query_scale(config: Any) -> None:
    if getattr(config, "query_pre_attn_scalar", None) is not None:
        config.query_pre_attn_scalar = query_scale(config)


def query_scale(config: Any) -> int:
    """What llama.cpp divides queries by, of a model that has a setting for it: a square, no file says it."""
    by_width = _SCALED_BY_WIDTH.get(config.model_type) == config.num_hidden_layers
    return int(config.hidden_size // config.num_attention_heads if by_width else config.head_dim)
