"""A conversation as the token ids that a model reads: the one place where a chat template is rendered for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Message


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that waits for the model's turn; without a chat template, its turns one below the
    other."""
    ids: list[int]
    if tokenizer.chat_template is None:
        ids = tokenizer.encode("".join(f"{message['content']}\n" for message in messages))
    else:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)  # a rendered template holds its special tokens already
    return ids
