"""POST /v1/responses: OpenAI's newer API as a conversation of the older one. Nothing is kept between two requests.

Knows its request's fields; what would need something kept, or a tool that the server would run, is refused by name. Its
answers' shapes are `polymerge.serve.items`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from ..engine.structure import Structure, json_object, json_structure
from .errors import ApiError
from .schema import CalledFunction, ChatMessage, ChatRequest, Extension, TextPart, ToolCall
from .strict import Harmless, Neutral, Nothing, Strict
from .tools import Function, FunctionChoice, FunctionName, NamedTool, Tool, ToolChoice


class Message(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: Harmless = None
    status: Harmless = None
    phase: Harmless = None


class Call(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: Harmless = None
    status: Harmless = None


class CallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]
    id: Harmless = None
    status: Harmless = None


class Reasoning(Strict):
    """An earlier answer's; models read no thoughts of the turns before, so it is left out."""

    type: Literal["reasoning"]
    id: Harmless = None
    summary: Harmless = None
    content: Harmless = None
    encrypted_content: Harmless = None
    status: Harmless = None


class FunctionTool(Strict):
    type: Literal["function"]  # first, so that another kind of tool is what an error is about
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    type: Literal["function"]
    name: FunctionName


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @property
    def structure(self) -> Structure | None:
        if self.type == "json_schema":
            return json_structure(True if self.schema_ is None else self.schema_, "text.format")
        return json_object("text.format") if self.type == "json_object" else None


class Text(Strict):
    format: TextFormat | None = None
    verbosity: Harmless = None


Item = Message | Call | CallOutput | Reasoning


class ResponseRequest(Strict):
    """POST /v1/responses"""

    model: str = "auto"
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    text: Text | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    truncation: Annotated[Any, AfterValidator(Neutral("disabled"))] = None
    background: Annotated[Any, AfterValidator(Neutral(False))] = None
    top_logprobs: Annotated[Any, AfterValidator(Neutral(0))] = None
    previous_response_id: Nothing = None
    conversation: Nothing = None
    prompt: Nothing = None
    max_tool_calls: Nothing = None
    context_management: Nothing = None
    polymerge: Extension = Extension()
    include: Harmless = None
    metadata: dict[str, str] | None = None
    reasoning: Harmless = None
    store: Harmless = None
    stream_options: Harmless = None
    service_tier: Harmless = None
    user: Harmless = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None

    @property
    def structure(self) -> Structure | None:
        return self.text.format.structure if self.text and self.text.format else None

    def as_chat(self) -> ChatRequest:
        """The same asked of the older API.

        Raises:
            ApiError: calls and outputs that make no conversation.
        """
        try:
            return self._chat()
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ApiError(400, f"input: {reason}", param="input") from None

    def _chat(self) -> ChatRequest:
        choice: ToolChoice | None
        if isinstance(self.tool_choice, NamedFunction):
            choice = NamedTool(function=FunctionChoice(name=self.tool_choice.name))
        else:
            choice = self.tool_choice
        tools = [Tool(function=Function(**tool.model_dump(exclude={"type"}))) for tool in self.tools or ()]
        return ChatRequest(
            model=self.model,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            tools=tools or None,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            polymerge=self.polymerge,
        )

    def _messages(self) -> list[ChatMessage]:
        messages = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, ChatMessage(role="user", content=self.input)]
        for item in self.input:
            if isinstance(item, Message):
                messages.append(ChatMessage(role=item.role, content=item.content))
            elif isinstance(item, CallOutput):
                messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=item.output))
            elif isinstance(item, Call):
                _add_call(messages, item)
        return messages


def _add_call(messages: list[ChatMessage], item: Call) -> None:
    """Calls that follow one another, or a text of the assistant's, are one turn."""
    call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
    last = messages[-1] if messages else None
    if last is not None and last.role == "assistant":
        messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})
    else:
        messages.append(ChatMessage(role="assistant", content=None, tool_calls=[call]))


def echoed(body: ResponseRequest) -> dict[str, Any]:
    """What a response says back of its request."""
    form = body.text.format if body.text and body.text.format else None
    said = form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}
    choice = body.tool_choice
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "text": {"format": said},
        "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "truncation": "disabled",
        "background": False,
        "store": False,
        "reasoning": {"effort": None, "summary": None},
    }
