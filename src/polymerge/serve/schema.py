"""The requests of the API: OpenAI's fields, and vLLM's where OpenAI has none.

A field that cannot change the answer is taken; one that would change it and is not supported is refused by name, unless
its value asks for nothing, as clients send it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ..engine.base import MOST_BIAS, MOST_PENALTY
from .errors import Fields
from .strict import Harmless, Neutral, NoList, NoText, Nothing, Strict
from .structure import Structured
from .tools import Tooled

# OpenAI's own bounds, the same at every server; this one's are in `polymerge.serve.settings`.
MOST_LOGPROBS = 20
MOST_STOPS = 4
LARGEST_SEED = 2**63 - 1


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Harmless = None


class Extension(Strict):
    """What only polymerge understands.

    Attributes:
        sticky: whether a conversation stays with its expert; False routes by the last user turn alone.
        thoughts: put the thinker's thoughts into the answer's `polymerge`.
    """

    sticky: bool = True
    thoughts: bool = False


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str
    cache_control: Harmless = None
    annotations: NoList = None


class CalledFunction(Strict):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Strict):
    """A call that an earlier answer made."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """As transformers' chat templates know it: with the arguments as a mapping, where they are one."""
        given = self.function.arguments
        try:
            arguments = json.loads(given) if isinstance(given, str) and given else given or {}
        except ValueError:
            arguments = given
        function = {"name": self.function.name, "arguments": arguments}
        return {"type": self.type, "function": function} | ({"id": self.id} if self.id is not None else {})


class ChatMessage(Strict):
    """One turn. Empty values of OpenAI's other fields are taken, as its client gives them back.

    A name, earlier reasoning and calls of tools go to the chat template, which writes them where it knows them.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: NoText = None
    annotations: NoList = None
    audio: Nothing = None
    function_call: CalledFunction | None = None  # the older form of a call, whose result has the role function
    cache_control: Harmless = None

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not self.calls:
            raise ValueError("a message needs content")
        if self.calls and self.role != "assistant":
            raise ValueError(f"{'tool_calls' if self.tool_calls else 'function_call'}: only the assistant calls tools")
        return self

    @property
    def calls(self) -> list[ToolCall]:
        return self.tool_calls or ([ToolCall(function=self.function_call)] if self.function_call else [])

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """The turn as chat templates know it."""
        more = {"name": self.name, "reasoning_content": self.reasoning_content, "tool_call_id": self.tool_call_id}
        calls = {"tool_calls": [call.for_template() for call in self.calls]} if self.calls else {}
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        return {"role": role, "content": self.text, **{k: v for k, v in more.items() if v is not None}, **calls}


TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Stop = str | Annotated[list[str], Field(max_length=MOST_STOPS)]


class Generating(Structured):
    """What chat and plain completions share."""

    model: str = "auto"
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-LARGEST_SEED, le=LARGEST_SEED)
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    polymerge: Extension = Extension()
    frequency_penalty: float | None = Field(default=None, ge=-MOST_PENALTY, le=MOST_PENALTY)
    presence_penalty: float | None = Field(default=None, ge=-MOST_PENALTY, le=MOST_PENALTY)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]] | None = None
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    ignore_eos: bool | None = None
    metadata: Harmless = None
    store: Harmless = None
    service_tier: Harmless = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None
    reasoning_effort: Harmless = None
    verbosity: Harmless = None
    priority: Harmless = None
    request_id: Harmless = None
    min_tokens: Annotated[Any, AfterValidator(Neutral(0))] = None
    length_penalty: Annotated[Any, AfterValidator(Neutral(1.0))] = None
    use_beam_search: Annotated[Any, AfterValidator(Neutral(False))] = None
    stop_token_ids: NoList = None
    include_stop_str_in_output: Annotated[Any, AfterValidator(Neutral(False))] = None
    skip_special_tokens: Annotated[Any, AfterValidator(Neutral(True))] = None
    spaces_between_special_tokens: Annotated[Any, AfterValidator(Neutral(True))] = None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def biases(self) -> dict[int, float]:
        """Token id -> what is added to its logit."""
        return {int(token): value for token, value in (self.logit_bias or {}).items()}

    @property
    def usage_at_the_end(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Tooled, Generating):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    modalities: Annotated[Any, AfterValidator(Neutral(["text"]))] = None
    prediction: Harmless = None
    audio: Nothing = None
    web_search_options: Nothing = None
    functions: NoList = None
    function_call: Annotated[Any, AfterValidator(Neutral("none", "auto"))] = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _goes_on_with_a_turn_of_its_own(self) -> ChatRequest:
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message: the last message is not the assistant's")
        if self.add_generation_prompt is self.continue_final_message:
            raise ValueError("add_generation_prompt: not with continue_final_message, and not to be left out without")
        return self

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs")
        return self

    @property
    def fields(self) -> Fields:
        return Fields("messages", "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens")

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Generating):
    """POST /v1/completions"""

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    suffix: NoText = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _best_of_all(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: not supported; leave it out or send the value of n")
        return self

    @property
    def fields(self) -> Fields:
        return Fields("prompt", "max_tokens")

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class EmbeddingRequest(Strict):
    """POST /v1/embeddings"""

    input: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    model: str = "auto"
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    dimensions: Nothing = None

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


class RouteRequest(Strict):
    """POST /v1/route: texts, each by itself, or one conversation."""

    input: str | Annotated[list[str], Field(min_length=1)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    polymerge: Extension = Extension()

    @model_validator(mode="after")
    def _one_of_both(self) -> RouteRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("input: give either it or messages")
        return self
