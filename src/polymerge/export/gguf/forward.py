"""What llama.cpp's forward passes leave out of a configuration, although its converters take the model.

It has each architecture as its makers published it: one activation, windows in some and in a fixed order, the query's
scale by a rule. What it reads from a file is in gguf's keys; what is here, it has no key for, or none that it reads.
Knows configurations; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ...sources.gguf_settings import BASE as ROPE_BASE
from ...sources.gguf_settings import query_scale

# Types of models whose windows llama.cpp has, in the order of layers that their configurations have by default. Of
# Mistral, Qwen 2 and Starcoder 2 it has none, of Phi 3 it says that they are switched off.
WINDOWED = {"cohere2", "exaone4", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "olmo3"}
# Names of the same function.
ALIKE = ({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"}, {"silu", "swish"})
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
# Of YaRN, with what llama.cpp takes for granted.
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
FLAGS = ("apply_residual_connection_post_layernorm", "scale_attn_by_inverse_layer_idx")
PLAIN_BASE = 10000.0  # of positions, where a file does not say


def left_out(folder: Path) -> list[str]:
    """One line for every setting of a checkpoint's configuration that llama.cpp passes over."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    return [f"the average: {line}" for line in (*_layers(config), *_positions(config), *_rest(config))]


def check_positions(file: Path, folder: Path) -> None:
    """Raises ModelError where a written base has other positions than the checkpoint: a converter that does not know
    where transformers has their base leaves it out."""
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    rope = _ropes(config)
    fields = gguf.GGUFReader(file).fields
    said = next((field.contents() for key, field in fields.items() if key.endswith(f".{ROPE_BASE}")), PLAIN_BASE)
    wanted = float((rope.get("full_attention") or next(iter(rope.values()), {})).get("rope_theta", said))
    if abs(said - wanted) > 1e-4 * wanted:
        raise ModelError(
            f"{file.name}: llama.cpp's converter left rope_theta at {said:g}, config.json says {wanted:g}; export one "
            "expert with --to dense, or take a newer llama.cpp"
        )


def _layers(config: Any) -> Iterator[str]:
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    active = getattr(config, "use_sliding_window", True) and int(window or 2**62) < _length(config)
    if not active or (kinds and "sliding_attention" not in kinds):
        return
    if config.model_type not in WINDOWED:
        yield f"a sliding window of {window} tokens: llama.cpp's {config.model_type} has none, so longer texts differ"
    elif kinds and kinds != getattr(_default(config, num_hidden_layers=config.num_hidden_layers), "layer_types", kinds):
        yield f"layer_types: llama.cpp's {config.model_type} has its windows in a fixed order of layers"


def _positions(config: Any) -> Iterator[str]:
    for rope in _ropes(config).values():
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            yield "rope_type 'longrope': llama.cpp chooses the factors by its context, not by the text's length"
        elif kind not in ROPE_TYPES:
            yield f"rope_type {kind!r}: llama.cpp does not scale positions so"
        for name in ("beta_fast", "beta_slow", "truncate") if kind == "yarn" else ():
            if rope.get(name) is not None and rope[name] != YARN[name]:
                yield f"{name} {rope[name]}: llama.cpp takes {YARN[name]}"
        if kind == "yarn" and rope.get("attention_factor") is not None:
            yield f"attention_factor {rope['attention_factor']}: llama.cpp takes YaRN's own"


def _rest(config: Any) -> Iterator[str]:
    usual = _default(config)
    for name in ACTIVATIONS:
        ours, theirs = getattr(config, name, None), getattr(usual, name, None)
        if isinstance(ours, str) and isinstance(theirs, str) and not _alike(ours, theirs):
            yield f"{name} {ours!r}: llama.cpp's {config.model_type} has {theirs!r}"
    for name in FLAGS:
        if getattr(config, name, False):
            yield f"{name}: llama.cpp's {config.model_type} does not know it"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != query_scale(config):
        yield f"query_pre_attn_scalar {scalar}: llama.cpp takes {query_scale(config)}"


def _ropes(config: Any) -> dict[str, Mapping[str, Any]]:
    """Settings of positions, by kind of layer or under one name."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = {kind: value for kind, value in rope.items() if isinstance(value, Mapping)}
    return nested or ({"": rope} if rope else {})


def _length(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 2**62)


def _alike(one: str, other: str) -> bool:
    return one == other or any({one, other} <= names for names in ALIKE)


def _default(config: Any, **settings: Any) -> Any:
    """What the class of a configuration has where nothing else is said; None where it cannot be made."""
    try:
        return type(config)(**settings)
    except Exception:  # some configurations cannot be made without arguments
        return None
