"""A conversation's request, ready to be answered: its expert, its prompt, and the form or the calls of its answer.

What `/v1/chat/completions` and `/v1/responses` share before and while an answer comes. Knows requests and engines; does
not know the shapes of either API.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.streaming import StreamingEngine
from ..engine.structure import Structure
from .calling import Format, format_of, told_tools
from .calls import CallReader
from .errors import ApiError
from .schema import ChatRequest
from .tools import Tool


@dataclass(frozen=True)
class Calling:
    """How an answer may call tools.

    Attributes:
        must: it begins inside of a call, which the prompt has begun.
        structure: of the answer.
    """

    form: Format
    tools: Sequence[Tool]
    must: bool
    structure: Structure = field(init=False)
    several: bool = True

    def __post_init__(self) -> None:
        made = self.form.structure(self.tools, must=self.must, several=self.several)
        object.__setattr__(self, "structure", made)

    def reader(self) -> CallReader:
        """Of one answer."""
        return CallReader(self.form, {tool.function.name for tool in self.tools}, inside=self.must)


def calling_of(engine: StreamingEngine, body: ChatRequest, expert: Any) -> Calling | None:
    """None for an answer that may call nothing.

    Raises:
        ApiError: a form beside tools.
    """
    tools = body.callable_tools
    if not tools:
        return None
    if body.structure is not None:
        message = f"{body.structure.name}: not together with tools; send tool_choice none, or leave one of both out"
        raise ApiError(400, message, param=body.structure.name)
    several = body.parallel_tool_calls is not False
    return Calling(format_of(engine.chat_template_of(expert)), tools, body.must_call, several=several)


def prompt_of(engine: StreamingEngine, body: ChatRequest, expert: Any, calling: Calling | None) -> list[int]:
    """Token ids of the conversation, with the tools that it offers, up to the beginning of a call that must be made."""
    messages = [message.for_template() for message in body.messages]
    begun = calling is not None and calling.must
    if begun and body.continue_final_message:
        raise ApiError(400, "continue_final_message: not with a tool_choice that must call", param="tool_choice")
    offered = body.tools or []
    agents = offered or any("tool_calls" in message or message["role"] == "tool" for message in messages)
    more: dict[str, Any] = {}
    if agents:
        form = format_of(engine.chat_template_of(expert))
        if form.in_template:
            more = {"tools": [tool.for_template for tool in offered]} if offered else {}
        else:
            messages = told_tools(messages, offered)
    ids = engine.chat_prompt(messages, expert=expert, go_on=body.continue_final_message, **more)
    if begun and calling is not None and calling.form.begin:
        ids = [*ids, *engine.encode(calling.form.begin, special=False, expert=expert)]
    return ids
