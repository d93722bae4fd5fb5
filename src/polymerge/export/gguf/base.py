"""base.gguf: the average, of an architecture that is written here. Holds one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bundle.bundle import Bundle
from ...engine.defaults import folder_defaults
from ...engine.llamacpp.folder import Kind
from ...errors import ModelError
from ...sources.gguf_file import ROPE_FACTORS, inverse_frequencies
from ...sources.persona import load_tokenizer
from .file import Stored, write_gguf
from .names import Architecture
from .tokens import describe_tokenizer
from .types import FILE_TYPES, stored_type


def write_base(bundle: Bundle, architecture: Architecture, file: Path, kind: Kind, *, untied: bool) -> None:
    """Writes the average.

    Args:
        untied: the embedding, which is the head too, is written once more as the head, so that experts can change both.

    Raises:
        ModelError: a tensor has no place, or the tokenizer is not one that is written.
    """
    config = bundle.persona().config

    def describe(writer: Any) -> None:
        _describe(writer, config, kind)
        tokenizer = load_tokenizer(bundle.persona())
        ends = folder_defaults(bundle.path, tokenizer).ends
        describe_tokenizer(writer, tokenizer, int(config["vocab_size"]), ends)

    write_gguf(file, architecture.name, describe, _tensors(bundle, architecture, kind, untied=untied))


def _tensors(bundle: Bundle, architecture: Architecture, kind: Kind, *, untied: bool) -> Iterator[Stored]:
    for layer in bundle.layers.values():
        names = [layer.tensor]
        if untied and layer.module == bundle.manifest.tied_embedding:
            names.append("lm_head.weight")
        for name in names:
            stored = stored_type(kind, layer.shape)
            yield Stored(architecture.tensor(name), layer.shape, stored, _reading(bundle, architecture, layer.tensor))
    factors = _rope_factors(bundle.path)
    if factors is not None:
        yield Stored(ROPE_FACTORS, tuple(factors.shape), stored_type("f32", tuple(factors.shape)), lambda: factors)


def _reading(bundle: Bundle, architecture: Architecture, tensor: str) -> Any:
    return lambda: architecture.rows(tensor, bundle.average_tensor(tensor))


def _describe(writer: Any, config: Mapping[str, Any], kind: Kind) -> None:
    import gguf

    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta")
    if theta is None:
        raise ModelError("config.json: no rope_theta; give --llama-cpp FOLDER")
    writer.add_type("model")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))


def _rope_factors(folder: Path) -> Tensor | None:
    """What divides the frequencies of Llama 3's positions; None of plain ones."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "llama3":
        return None
    plain = inverse_frequencies(config, {**rope, "rope_type": "default"})
    return (plain / inverse_frequencies(config, rope)).to(torch.float32)
