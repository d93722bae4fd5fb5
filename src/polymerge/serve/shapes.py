"""The answers of the API in OpenAI's shapes: whole, or as chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from ..engine.streaming import Piece, TokenScore
from .answering import Calling
from .answers import Gathered
from .calls import CallPiece, CallReader, read_piece, whole_calls

# What some clients take for the end of a line; JSON knows all three as escapes.
LINE_ENDS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"})
LOWEST = -9999.0  # stands for minus infinity, which JSON does not know


class Shape(Protocol):
    """What differs between the two kinds of completions."""

    def head(self) -> dict[str, Any]:
        """Fields of every answer and chunk."""

    def choice(self, number: int, answer: Gathered) -> dict[str, Any]:
        """One whole answer."""

    def opening(self, number: int) -> list[dict[str, Any]]:
        """What a stream tells of an answer before its text."""

    def delta(self, number: int, piece: Piece) -> dict[str, Any] | None:
        """One piece of it; None where it shows nothing yet."""


class ChatShape:
    """chat.completion

    Args:
        calling: how answers may call tools.
    """

    def __init__(
        self, model: str, fingerprint: str, *, scored: bool, stream: bool, calling: Calling | None = None
    ) -> None:
        self._scored, self._calling = scored, calling
        self._readers: dict[int, CallReader] = {}
        self._head = _head("chatcmpl", "chat.completion" + (".chunk" if stream else ""), model, fingerprint)

    def head(self) -> dict[str, Any]:
        return dict(self._head)

    def choice(self, number: int, answer: Gathered) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        finish: str = answer.finish
        if self._calling is not None:
            text, calls = whole_calls(self._calling.reader(), answer.text)
            if calls:
                message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
                finish = "tool_calls" if finish == "stop" else finish
        logprobs = self._logprobs(answer.scores)
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, number: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": number, "delta": delta, "logprobs": None, "finish_reason": None}]

    def delta(self, number: int, piece: Piece) -> dict[str, Any] | None:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        finish: str | None = piece.finish
        if self._calling is not None:
            reader = self._readers.setdefault(number, self._calling.reader())
            text, calls = read_piece(reader, piece)
            delta = ({"content": text} if text else {}) | ({"tool_calls": [*map(_call_delta, calls)]} if calls else {})
            finish = "tool_calls" if finish == "stop" and reader.calls else finish
            if not (delta or finish or piece.scores):
                return None
        logprobs = self._logprobs(piece.scores) if piece.scores else None
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._scored:
            return None
        content = [
            _chat_token(score.text, score.logprob) | {"top_logprobs": [_chat_token(*other) for other in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """text_completion

    Args:
        echoes: text of the prompt of every answer, where it is to be given back.
    """

    def __init__(self, model: str, fingerprint: str, *, scored: bool, echoes: Sequence[str] | None) -> None:
        self._scored, self._echoes = scored, echoes
        self._head = _head("cmpl", "text_completion", model, fingerprint)
        self._offsets: dict[int, int] = {}

    def head(self) -> dict[str, Any]:
        return dict(self._head)

    def choice(self, number: int, answer: Gathered) -> dict[str, Any]:
        whole = Piece(answer.text, answer.tokens, answer.finish, tuple(answer.scores), tuple(answer.prompt_scores))
        return self._piece(number, whole, self._echo(number))

    def opening(self, number: int) -> list[dict[str, Any]]:
        """The echo comes with the first piece, whose scores are the prompt's, unless nothing is scored."""
        if self._scored or self._echoes is None:
            return []
        return [self._piece(number, Piece(self._echo(number), 0), "")]

    def delta(self, number: int, piece: Piece) -> dict[str, Any]:
        first = self._scored and number not in self._offsets
        return self._piece(number, piece, self._echo(number) if first else "")

    def _echo(self, number: int) -> str:
        return self._echoes[number] if self._echoes else ""

    def _piece(self, number: int, piece: Piece, echo: str) -> dict[str, Any]:
        logprobs = self._logprobs(number, piece) if self._scored else None
        return {"index": number, "text": echo + piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, number: int, piece: Piece) -> dict[str, Any]:
        """Offsets are places in the text that the choice gives: the prompt's where it is echoed, then the answer's."""
        scores, behind = [*piece.prompt_scores, *piece.scores], len(self._echo(number))
        offsets, place = [], self._offsets.get(number, 0)
        for index, score in enumerate(scores):
            if score.start is not None:
                place = score.start + (behind if index >= len(piece.prompt_scores) else 0)
            offsets.append(place)
            place += len(score.text)
        self._offsets[number] = place
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [_number(score.logprob) for score in scores],
            "top_logprobs": [_top(score) for score in scores],
            "text_offset": offsets,
        }


def _call(call: CallPiece) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta(call: CallPiece) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.number, "function": {"arguments": call.arguments}}
    return {"index": call.number, **_call(call)}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """`usage` of an answer."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def event(data: dict[str, Any] | str, name: str | None = None) -> bytes:
    """One server-sent event, with its name where it has one."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text.translate(LINE_ENDS)}\n\n".encode()


def _head(prefix: str, kind: str, model: str, fingerprint: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"fp_{fingerprint[:16]}",
    }


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)


def _chat_token(text: str, logprob: float | None) -> dict[str, Any]:
    """`bytes` is null for a token that is a part of a character."""
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": _number(logprob), "bytes": known}


def _top(score: TokenScore) -> dict[str, float] | None:
    """Likeliest tokens by text. One whose text is there already (parts of characters look alike) stands as
    `token_id:N`, or counts as the likelier of the two where its number is not known."""
    if score.logprob is None:
        return None
    top: dict[str, float] = {}
    for place, (text, logprob) in enumerate(score.top):
        name = f"token_id:{score.top_ids[place]}" if text in top and score.top_ids else text
        top[name] = max(top.get(name, LOWEST), logprob, LOWEST)
    return top
