"""Reads calls of tools out of an answer as it comes: text, and the name and arguments of each call, piece by piece.

What looks like a call and is none stays text. Knows the formats of `polymerge.serve.calling`; does not know requests.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..engine.streaming import Piece
from .calling import Format

PYTHON_TAG = "<|python_tag|>"
SPACE = " \t\r\n"
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
State = Literal["start", "text", "call", "arguments", "after"]


@dataclass(frozen=True)
class CallPiece:
    """A part of a call.

    Attributes:
        number: of the call in its answer.
        id, name: in a call's first piece.
    """

    number: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class CallReader:
    """Reads one answer.

    Args:
        names: of the tools; another name makes no call.
        inside: the answer begins inside of a call.

    Attributes:
        calls: so many were made.
    """

    def __init__(self, form: Format, names: Collection[str], *, inside: bool = False) -> None:
        self._form, self._names = form, names
        self._begin, self._end = form.begin.strip(), form.end.strip()
        self._state: State = "call" if inside else "text" if self._begin else "start"
        self._buffer = ""
        self._opened = "" if inside else self._begin  # what stands before a call that turns out to be none
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """More of the answer. Returns the text that may be shown, and the parts of calls."""
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> tuple[str, list[CallPiece]]:
        """What was held back, when nothing more comes."""
        shown, pieces = self._run(final=True)
        if self._state == "call":
            shown += self._as_text()
        return shown, pieces

    def _run(self, *, final: bool) -> tuple[str, list[CallPiece]]:
        shown, pieces = "", list[CallPiece]()
        while True:
            before = (self._state, len(self._buffer))
            if self._state in ("start", "text"):
                shown += self._read_start(final) if self._state == "start" else self._read_text(final)
            elif self._state == "call":
                text, read = self._read_call()
                shown, pieces = shown + text, pieces + read
            elif self._state == "arguments":
                pieces += self._read_arguments()
            else:
                self._read_after()
            if before == (self._state, len(self._buffer)):
                return shown, _joined(pieces)

    def _read_start(self, final: bool) -> str:
        """An answer without a mark before its call is a call if it begins like one."""
        rest = self._buffer.lstrip(SPACE)
        if rest.startswith(PYTHON_TAG):
            rest = self._buffer = rest.removeprefix(PYTHON_TAG).lstrip(SPACE)
            self._state = "call"
        elif rest.startswith("{"):
            self._state, self._buffer = "call", rest
        elif rest and (final or not PYTHON_TAG.startswith(rest)):
            self._state, self._begin = "text", ""
        return ""

    def _read_text(self, final: bool) -> str:
        place = self._buffer.find(self._begin) if self._begin else -1
        if place >= 0:
            shown, self._buffer = self._buffer[:place].rstrip(SPACE), self._buffer[place + len(self._begin) :]
            self._state, self._opened = "call", self._begin
            return shown
        held = 0 if final or not self._begin else self._may_begin()
        shown, self._buffer = self._buffer[: len(self._buffer) - held], self._buffer[len(self._buffer) - held :]
        return "" if final and self.calls and not shown.strip() else shown

    def _may_begin(self) -> int:
        """How many of the last characters may belong to the mark before a call; white space before it does."""
        whole = len(self._buffer)
        marked = next((n for n in range(len(self._begin), 0, -1) if self._buffer.endswith(self._begin[:n])), 0)
        return whole - len(self._buffer[: whole - marked].rstrip(SPACE))

    def _read_call(self) -> tuple[str, list[CallPiece]]:
        text = self._buffer.lstrip(SPACE + ("[," if self._form.array else ""))
        head = _HEAD.match(text)
        if head and (name := json.loads(head[1])) in self._names:
            self._state, self._buffer = "arguments", text[head.end() :]
            return "", [self._begun(name)]
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except ValueError:
            if text and not text.startswith("{"):
                self._state = "text"
                return self._as_text(), []
            return "", []
        name, arguments = _parts(value)
        if name not in self._names:
            self._state = "text"
            return self._as_text(), []
        self._state, self._buffer = "after", text[end:]
        return "", [replace(self._begun(name), arguments=arguments)]

    def _begun(self, name: str) -> CallPiece:
        self.calls += 1
        # Mistral's templates want nine letters or digits
        made = secrets.token_hex(5)[:9] if self._form.array else f"call_{secrets.token_hex(12)}"
        return CallPiece(self.calls - 1, "", made, name)

    def _read_arguments(self) -> list[CallPiece]:
        """Characters of a JSON object up to the brace that closes it."""
        for place, sign in enumerate(self._buffer):
            if self._quoted:
                self._quoted = self._escaped or sign != '"'
                self._escaped = sign == "\\" and not self._escaped
            elif sign == '"':
                self._quoted = True
            else:
                self._depth += (sign in "{[") - (sign in "}]")
                if not self._depth:
                    read, self._buffer, self._state = self._buffer[: place + 1], self._buffer[place + 1 :], "after"
                    return [CallPiece(self.calls - 1, read)]
        read, self._buffer = self._buffer, ""
        return [CallPiece(self.calls - 1, read)] if read else []

    def _read_after(self) -> None:
        """What follows a call's arguments: its end, and the next call of an array or of a row of them."""
        if self._end:
            place = self._buffer.find(self._end)
            if place >= 0:
                self._state, self._buffer = "text", self._buffer[place + len(self._end) :]
            return
        self._buffer = self._buffer.lstrip(SPACE + "},;")
        if self._buffer.startswith("{"):
            self._state, self._opened = "call", ""
        elif self._buffer:
            self._state, self._begin = "text", ""
            self._buffer = self._buffer.removeprefix("]")

    def _as_text(self) -> str:
        shown, self._buffer = self._opened + self._buffer, ""
        return shown


def read_piece(reader: CallReader, piece: Piece) -> tuple[str, list[CallPiece]]:
    """What one piece of an answer adds; with the last one, what was held back."""
    shown, calls = reader.push(piece.text)
    if piece.finish is not None:
        rest, more = reader.finish()
        shown, calls = shown + rest, _joined(calls + more)
    return shown, calls


def whole_calls(reader: CallReader, text: str) -> tuple[str, list[CallPiece]]:
    """The text of a whole answer beside its calls, and these."""
    return read_piece(reader, Piece(text, 0, "stop"))


def _parts(value: Any) -> tuple[str, str]:
    """Name and arguments of a call as it was parsed; empty where it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return "", ""
    arguments = value.get("arguments", value.get("parameters", {}))
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _joined(pieces: list[CallPiece]) -> list[CallPiece]:
    """One piece a call."""
    made: list[CallPiece] = []
    for piece in pieces:
        if made and made[-1].number == piece.number:
            made[-1] = replace(made[-1], arguments=made[-1].arguments + piece.arguments)
        else:
            made.append(piece)
    return made
