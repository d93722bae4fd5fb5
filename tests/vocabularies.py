"""Tiny chat models with other vocabularies that share a beginning. Random, for tests only.

`plain` has VOCAB tokens and as many rows; its kin are made by transformers' own `resize_token_embeddings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.fine_tunes import Original
from tests.tiny import COMMON, VOCAB, make_experts, tiny_tokenizer

# Configurations of those whose ends are unlike: two tables, one that is both, one with a bias.
HEADS: dict[str, Any] = {
    "untied": lambda: hf.LlamaConfig(**COMMON),
    "tied": lambda: hf.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "bias": lambda: hf.PhiConfig(**{**COMMON, "num_key_value_heads": 4}),
}
ADDED = ("<|im_start|>", "<|im_end|>")
WIDE = VOCAB + len(ADDED)
PADDED = 128


def tokenizer_with(*tokens: str) -> Any:
    """`tiny_tokenizer` with tokens behind its words."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def resize(path: Path, rows: int, tokenizer: Any, seed: int) -> Original:
    """Gives a checkpoint in place so many rows, all new ones random, and a tokenizer."""
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    before = model.config.vocab_size
    model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in _tables(model):
            table[before:] = 0.3 * torch.randn(table[before:].shape, generator=generator)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Original(path)


def _tables(model: Any) -> list[torch.Tensor]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    bias = [head.bias] if head.bias is not None else []
    return [embedding.weight, *([head.weight] if head.weight is not embedding.weight else []), *bias]


def kin(folder: Path, head: str, sizes: Sequence[int], tokens: Sequence[Sequence[str]], **make: Any) -> list[Original]:
    """Fine-tunes of one base, each with so many rows and these tokens behind the words."""
    paths = make_experts("llama", folder, count=len(sizes), config=HEADS[head](), **make).values()
    triples = enumerate(zip(paths, sizes, tokens, strict=True))
    return [resize(path, rows, tokenizer_with(*added), seed) for seed, (path, rows, added) in triples]
