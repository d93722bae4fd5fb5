"""Small GGUF files as llama.cpp's converter writes them, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

Tensors = dict[str, np.ndarray]


def write_gguf(
    file: Path,
    folder: Path,
    *,
    change: Callable[[Tensors], Any] = lambda tensors: None,
    fields: Callable[[Any], Any] = lambda writer: None,
    kind: str = "model",
    tokens: Callable[[list[str]], Any] = lambda tokens: None,
) -> Path:
    """The model of a folder as a GGUF file in float32, with the settings that all architectures have.

    Args:
        change: edits the tensors, by GGUF's names.
        fields: adds metadata.
        kind: `general.type`.
        tokens: edits the vocabulary, of byte-level BPE; its first three are special, and the next two can be
            merged.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(kind)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(
            getattr(config, "norm_eps", None) or getattr(config, "norm_epsilon", None) or config.layer_norm_eps
        )
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size, tokens)
    fields(writer)
    tensors = gguf_tensors(model)
    change(tensors)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_tensors(model: Any) -> Tensors:
    """The model's tensors under GGUF's names; rows of q and k in llama.cpp's order where the architecture needs it."""
    config = model.config
    kinds = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    kind = config.model_type.removesuffix("_text")
    names = gguf.get_tensor_name_map(kinds[kind], config.num_hidden_layers)
    tensors = {}
    tied = config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        module, _, parameter = name.rpartition(".")
        if kind == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            value = _interleaved(value, heads)
        if kind in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
            value = value + 1
        tensors[f"{names.get_name(module)}.{parameter}"] = value.numpy()
    return tensors


def _interleaved(value: torch.Tensor, heads: int) -> torch.Tensor:
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _add_tokenizer(writer: Any, size: int, change: Callable[[list[str]], Any]) -> None:
    tokens = ["<unk>", "<s>", "</s>", "w", "3", "w3", *(f"t{number}" for number in range(6, size))]
    change(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (size - 3))
    writer.add_token_merges([f"{tokens[3]} {tokens[4]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
