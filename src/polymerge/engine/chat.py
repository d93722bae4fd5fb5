"""A conversation as the token ids that a model reads: the one place where a chat template is rendered for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Message
from .text import check_text


def chat_ids(
    tokenizer: Any, messages: Sequence[Message], *, go_on: bool = False, tools: Sequence[Message] = ()
) -> list[int]:
    """Token ids of a conversation that waits for the model's turn; without a chat template, its turns one below the
    other.

    Args:
        go_on: the last message is the beginning of that turn, and is left open.
        tools: that the model may call; where the template writes none, they are not seen.

    Raises:
        ModelError: as `check_text`. Whatever a template raises for turns that it does not know.
    """
    ids: list[int]
    if tokenizer.chat_template is None:
        text = "".join(f"{message['content']}\n" for message in messages)
        text = text.removesuffix("\n") if go_on else text
        check_text(text)
        ids = tokenizer.encode(text)
    else:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=not go_on,
            continue_final_message=go_on,
        )
        check_text(text)
        ids = tokenizer.encode(text, add_special_tokens=False)  # a rendered template holds its special tokens already
    return ids
