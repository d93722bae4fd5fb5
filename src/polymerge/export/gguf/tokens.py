"""A tokenizer as a GGUF file has it: byte-level BPE of a kind of splitting that llama.cpp knows.

llama.cpp splits a text by rules that it has under names. Which name a tokenizer has is read off its own rule: only what
is the same, character by character, gets one. All others are llama.cpp's converter's, which knows them by heart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import ModelError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What splits a text -> llama.cpp's name for it (src/llama-vocab.cpp); "digits" are single ones.
SPLITS = {
    (GPT2,): "gpt-2",
    ("digits", GPT2): "smollm",
    (_CASELESS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CASELESS + r"\p{N}" + _REST,): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


def splitting(backend: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer (the content of tokenizer.json) splits; None where it has none."""
    model = backend["model"]
    plain = not (model.get("byte_fallback") or model.get("dropout") or model.get("continuing_subword_prefix"))
    plain = plain and bool(model.get("merges"))  # without any, llama.cpp takes it for a broken file
    if model.get("type") != "BPE" or not plain or (backend.get("normalizer") or {}).get("type", "NFC") != "NFC":
        return None
    outer = backend.get("pre_tokenizer") or {}
    parts = outer.get("pretokenizers", [outer])
    rules = [_rule(part) for part in parts]
    name = SPLITS.get(tuple(rule for rule in rules if rule))
    return None if None in rules or (parts and parts[-1].get("type") != "ByteLevel") else name


def _rule(part: Mapping[str, Any]) -> str | None:
    """What a step splits by; "" of a step that only writes bytes as characters, None of an unknown one."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return GPT2 if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        pattern: str | None = part["pattern"].get("Regex")
        return pattern
    return None


def describe_tokenizer(writer: Any, tokenizer: Any, rows: int, ends: frozenset[int]) -> None:
    """Adds a tokenizer to gguf's writer.

    Args:
        rows: of the embedding; those without a token are unused ones.
        ends: tokens that end an answer.

    Raises:
        ModelError: llama.cpp's rules are not known to be this tokenizer's, or it has tokens that the model has not.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    name = splitting(backend)
    if name is None:
        raise ModelError(f"{tokenizer.name_or_path}: its tokenizer is not one that is written; give --llama-cpp FOLDER")
    text, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= rows:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has a token {last} ({text!r}), the model {rows} rows; take out "
            "of tokenizer.json what the model does not know"
        )
    tokens, types = _vocabulary(backend, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    for token in sorted(ends - {tokenizer.eos_token_id})[:1]:
        writer.add_eot_token_id(token)
    ids = tokenizer.encode("a")
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _vocabulary(backend: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for text, number in backend["model"]["vocab"].items():
        tokens[number], types[number] = text, NORMAL
    for added in backend.get("added_tokens") or ():
        number = added["id"]
        tokens[number], types[number] = added["content"], CONTROL if added["special"] else USER_DEFINED
    return tokens, types
