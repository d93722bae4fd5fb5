"""Whether this machine's memory holds an exported folder and its cache: computed before llama.cpp reads a file.

llama.cpp maps the base, so that without room for it every token would read it from the disk; for what it allocates it
is ended by the system. Knows sizes of files, and what an architecture keeps of a token.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import ModelError
from ...host import available_memory
from ...model.remembered import remembered
from ...sources.layers import meta_model
from .folder import GgufNote


def check_room(folder: Path, note: GgufNote, cache_tokens: int) -> None:
    """Raises ModelError where weights, adapters and the cache of so many tokens are more than what is free."""
    free = available_memory()
    if free is None:
        return
    weights = note.base_bytes + sum(expert.bytes for expert in note.experts.values())
    cache = _cache(folder, cache_tokens)
    if weights + cache > free:
        raise ModelError(
            f"{folder}: wants {(weights + cache) / 1e9:.2f} GB of memory ({weights / 1e9:.2f} GB of weights, and the "
            f"cache of {cache_tokens} tokens), and {free / 1e9:.2f} GB are free; give fewer --cache-tokens, end other "
            "programs, or export in fewer bits (--type)"
        )


def _cache(folder: Path, tokens: int) -> int:
    """Keys and values in 16 bits, as llama.cpp keeps them; nothing for an architecture that cannot be built here."""
    model = meta_model(folder)
    return remembered(type(model), model.config, torch.float16).bytes(tokens) if model is not None else 0
