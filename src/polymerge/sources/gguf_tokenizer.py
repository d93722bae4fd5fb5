"""The tokenizer of a GGUF file, where transformers rebuilds it otherwise than llama.cpp reads it.

A file names the rules by which byte-level BPE cuts a text into words; transformers knows some names, and takes GPT-2's
rules for the others. It numbers special tokens that are not spelled in bytes anew, beyond the vocabulary. Knows
`tokenizer.json`; does not know weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SourceError

State = dict[str, Any]
_CONTROL, _USER_DEFINED = 3, 4

# Names of GPT-2's own rules; a file without a name is older than the names.
GPT2 = {None, "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4"}
# A word that is a token stays whole, and a text begins with the first token unless the file says otherwise.
WHOLE = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


def _split(pattern: str) -> State:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _digits(*, one_by_one: bool) -> State:
    return {"type": "Digits", "individual_digits": one_by_one}


def _bytes(*, words: bool) -> State:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}


_DIGITS = [_digits(one_by_one=True), _bytes(words=True)]
_DEEPSEEK = [*map(_split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")), _bytes(words=False)]
CUTS: Mapping[str, Sequence[State]] = {
    **dict.fromkeys(("starcoder", "smollm", "refact", "codeshell", "command-r"), _DIGITS),
    **dict.fromkeys(("deepseek-llm", "deepseek-coder"), _DEEPSEEK),
    "falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        _bytes(words=True),
        _digits(one_by_one=False),
        _split("[0-9][0-9][0-9]"),
    ],
    "bloom": [_split(" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"), _bytes(words=False)],
    "stablelm2": [_split(_QWEN2), _bytes(words=False)],
}


def mend_tokenizer(folder: Path, fields: Mapping[str, Any], label: str) -> None:
    """Makes the folder's tokenizer, as transformers saved it, read a text as llama.cpp does with the file.

    Raises:
        SourceError: neither transformers nor this module knows the rules that the file names.
    """
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    state = json.loads(file.read_text("utf-8"))
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    if said.get("model") == "gpt2":
        _cut(state, said, label)
        _number(state, said)
        _begin(state, said, json.loads(settings.read_text("utf-8")).get("bos_token"))
    elif said.get("model") == "llama":
        _prefix(state, said)
    if state != json.loads(file.read_text("utf-8")):
        file.write_text(json.dumps(state, ensure_ascii=False), "utf-8")
        # a class of its own would rebuild what was changed
        plain = json.loads(settings.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.write_text(json.dumps(plain, ensure_ascii=False, indent=2), "utf-8")


def _cut(state: State, said: Mapping[str, Any], label: str) -> None:
    rules: str | None = said.get("pre")
    if rules is not None and rules in CUTS:
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": CUTS[rules]}
    elif rules not in GPT2 and "Split" not in str(state["pre_tokenizer"]):
        raise SourceError(
            f"{label}: texts are cut into words by {rules!r}, which this version of transformers does not know; give "
            "the model's own folder instead"
        )
    if rules in WHOLE:
        state["model"]["ignore_merges"] = True


def _number(state: State, said: Mapping[str, Any]) -> None:
    """Special tokens have the file's numbers, also where they are not spelled in bytes."""
    tokens, kinds = said["tokens"], said.get("token_type", [])
    special = {
        token: n
        for n, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (_CONTROL, _USER_DEFINED)
    }
    vocabulary, added = state["model"]["vocab"], {entry["content"]: entry for entry in state["added_tokens"]}
    spelled = {number: token for token, number in vocabulary.items()}
    for token, number in special.items():
        if vocabulary.get(token) != number:
            vocabulary.pop(spelled.get(number), None)
            vocabulary[token] = number
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        entry = added.get(token) or plain | {"content": token, "special": kinds[number] == _CONTROL}
        added[token] = entry | {"id": number}
    kept = (entry for entry in added.values() if entry["id"] < len(tokens))
    state["added_tokens"] = sorted(kept, key=lambda entry: entry["id"])


def _begin(state: State, said: Mapping[str, Any], first: str | None) -> None:
    """Whether a text begins with the first token, and which number that has."""
    if "add_bos_token" not in said and said.get("pre") in WHOLE and first is not None:
        begin = {"SpecialToken": {"id": first, "type_id": 0}}
        first_text, second_text = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
        state["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, first_text],
            "pair": [begin, first_text, {"SpecialToken": {"id": first, "type_id": 1}}, second_text],
            "special_tokens": {first: {"id": first, "ids": [], "tokens": [first]}},
        }
    for token, entry in ((state["post_processor"] or {}).get("special_tokens") or {}).items():
        entry["ids"] = [state["model"]["vocab"][token]]


def _prefix(state: State, said: Mapping[str, Any]) -> None:
    """sentencepiece: a space before every text, whatever it begins with, unless the file says otherwise."""
    if "Metaspace" not in str(state["pre_tokenizer"]) and "Prepend" not in str(state["normalizer"]):
        return
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prefix = [{"type": "Prepend", "prepend": "\u2581"}] if said.get("add_space_prefix", True) else []
    state["normalizer"] = {"type": "Sequence", "normalizers": [*prefix, space]}
    state["pre_tokenizer"] = None
