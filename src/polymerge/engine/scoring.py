"""The tokens of a request for a score: a context that is cut to fit, and the continuation after it."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError


def scored_pair(
    context: list[int], continuation: list[int], tokenizer: Any, max_length: int
) -> tuple[list[int], list[int]]:
    """Context and continuation as the contract has them: an empty context is the tokenizer's first special token, and
    one that is too long loses its beginning.

    Args:
        max_length: of both together, in tokens.

    Raises:
        ModelError: no continuation, one that leaves no room for a context, or nothing to stand for an empty context.
    """
    if not continuation:
        raise ModelError("loglikelihood: the continuation is empty")
    room = max_length - len(continuation)
    if room < 1:
        raise ModelError(
            f"loglikelihood: a continuation of {len(continuation)} tokens does not fit the model's context"
        )
    return (context or [_first_token(tokenizer)])[-room:], continuation


def _first_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError("loglikelihood: the context is empty and the tokenizer has no first token to stand for it")
