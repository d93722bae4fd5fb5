"""A response's items and events: texts and calls as `/v1/responses` has them, whole or as they come.

Knows shapes and their order; does not know requests. One answer becomes one message, the calls that it makes, or both.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ..engine.streaming import Finish, Piece
from .answering import Calling
from .calls import CallPiece, read_piece

Event = dict[str, Any]


class Items:
    """One answer in the making.

    Args:
        echo: what the response says back of its request.

    Attributes:
        output: the items so far.
    """

    def __init__(self, echo: Mapping[str, Any], calling: Calling | None) -> None:
        self._reader = calling.reader() if calling else None
        self._id, self._echo, self._created = f"resp_{uuid.uuid4().hex}", dict(echo), int(time.time())
        self.output: list[dict[str, Any]] = []
        self._number = 0

    def response(self, status: str, spent: Mapping[str, Any] | None = None, finish: Finish | None = None) -> Event:
        """The whole response as it is now."""
        cut = {"reason": "max_output_tokens"} if finish == "length" else None
        done = int(time.time()) if status == "completed" else None
        head = {"id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None}
        made = {"incomplete_details": cut, "completed_at": done, "output": self.output, "usage": spent}
        return head | self._echo | made

    def begin(self) -> Iterator[Event]:
        """Before anything is said."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))

    def add(self, piece: Piece) -> Iterator[Event]:
        """What a piece of the answer says."""
        text, calls = read_piece(self._reader, piece) if self._reader else (piece.text, [])
        if text:
            yield from self._text(text)
        for call in calls:
            yield from self._call(call)
        if piece.finish is not None:
            if not self.output:
                yield from self._text("")
            yield from self._close("incomplete" if piece.finish == "length" else "completed")

    def end(self, spent: Mapping[str, Any], finish: Finish, extra: Mapping[str, Any]) -> Event:
        """The last event."""
        status = "incomplete" if finish == "length" else "completed"
        return self._event(f"response.{status}", response=self.response(status, spent, finish) | dict(extra))

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _text(self, text: str) -> Iterator[Event]:
        if not self.output or self.output[-1]["type"] != "message":
            yield from self._close("completed")
            item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", "role": "assistant"}
            yield from self._opened(item | {"content": []})
            self.output[-1]["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
            yield self._event(
                "response.content_part.added",
                **self._place(),
                content_index=0,
                part=dict(self.output[-1]["content"][0]),
            )
        if text:
            self.output[-1]["content"][0]["text"] += text
            yield self._event("response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[])

    def _call(self, call: CallPiece) -> Iterator[Event]:
        if call.name is not None:
            yield from self._close("completed")
            item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call.id, "name": call.name}
            yield from self._opened(item | {"arguments": "", "status": "in_progress"})
        if call.arguments:
            self.output[-1]["arguments"] += call.arguments
            yield self._event("response.function_call_arguments.delta", **self._place(), delta=call.arguments)

    def _opened(self, item: dict[str, Any]) -> Iterator[Event]:
        self.output.append(item)
        said = item | ({"content": []} if item["type"] == "message" else {})
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=said)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _close(self, status: str) -> Iterator[Event]:
        """The last item is whole."""
        if not self.output or self.output[-1]["status"] != "in_progress":
            return
        item = self.output[-1]
        if item["type"] == "message":
            part = item["content"][0]
            place = self._place() | {"content_index": 0}
            yield self._event("response.output_text.done", **place, text=part["text"], logprobs=[])
            yield self._event("response.content_part.done", **place, part=part)
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._place(), **said)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=dict(item))


def spent(read: int, written: int) -> dict[str, Any]:
    """`usage` of a response."""
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }
