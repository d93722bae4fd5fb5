"""What a checkpoint's generation_config.json says of requests, by the rule of `vllm serve`: docs/decoding.md.

The numbers a sampler takes are defaults of a request that leaves them out, `eos_token_id` adds end tokens, and all else
(`no_repeat_ngram_size`, `suppress_tokens`, `min_length`, beams ...) is left out, in every engine. Knows a checkpoint's
settings; does not know requests or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError


@dataclass(frozen=True)
class GenerationDefaults:
    """Settings of a request that names none.

    A server takes all of them. `GenerateRequest` is greedy where it does not say otherwise, so that evaluations do not
    draw; of these, `repetition_penalty` counts there too, because it changes the likeliest token.

    Attributes:
        max_new_tokens: None where the checkpoint says nothing.
        ends: tokens after which an answer is over.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    ends: frozenset[int] = frozenset()


# The settings that count, with what each may be.
ALLOWED: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value < math.inf,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: value >= -1 and value == int(value),
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: 0 < value < math.inf,
    "max_new_tokens": lambda value: value >= 1 and value == int(value),
}


def checkpoint_defaults(config: Any, tokenizer: Any, label: str) -> GenerationDefaults:
    """A checkpoint's settings.

    Args:
        config: transformers' generation configuration; a setting that it lacks, or that is None, is not set.
        tokenizer: its end token ends an answer too.
        label: names the checkpoint in errors.

    Raises:
        ModelError: a setting that means nothing.
    """
    given = {name: _number(config, name, label) for name in ALLOWED}
    if given["top_k"] is not None:
        given["top_k"] = max(0, given["top_k"])  # -1 is another way to say all of them
    ends = getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    tokens = frozenset(int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None)
    return GenerationDefaults(**{name: value for name, value in given.items() if value is not None}, ends=tokens)


def folder_defaults(folder: Any, tokenizer: Any) -> GenerationDefaults:
    """Those of a folder whose model is not loaded. Raises ModelError as `checkpoint_defaults` does."""
    from transformers import AutoConfig, GenerationConfig

    config: Any = None
    if (folder / "generation_config.json").exists():
        config = _opened(lambda: GenerationConfig.from_pretrained(folder, local_files_only=True), folder)
    elif (folder / "config.json").exists():  # as transformers does where there is no such file
        read = _opened(lambda: AutoConfig.from_pretrained(folder, local_files_only=True), folder)
        config = GenerationConfig.from_model_config(read)
    return checkpoint_defaults(config, tokenizer, str(folder))


def _opened(read: Callable[[], Any], folder: Any) -> Any:
    try:
        return read()
    except Exception as error:  # transformers raises many types for one unusable file
        raise ModelError(f"{folder}: no usable configuration ({' '.join(str(error).split())[:200]})") from None


def _number(config: Any, name: str, label: str) -> Any:
    value = getattr(config, name, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not ALLOWED[name](value):
        raise ModelError(f"{label}: generation_config.json: {name} cannot be {value!r}")
    return int(value) if name in ("top_k", "max_new_tokens") else float(value)
