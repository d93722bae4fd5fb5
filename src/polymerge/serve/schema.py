"""The requests of the API: OpenAI's fields. One that is unknown, or that would change nothing here, is refused.

A field of OpenAI's that this server does not support is taken where its value asks for nothing, as clients send it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# OpenAI's own bounds, the same at every server; this one's are in `polymerge.serve.settings`.
MOST_LOGPROBS = 20
MOST_STOPS = 4
LARGEST_SEED = 2**63 - 1


class Neutral:
    """Marks a field whose only accepted values are those that ask for nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __call__(self, value: Any) -> Any:
        if value is not None and value not in self.values:
            raise ValueError(f"not supported; leave it out or send {self.values[0]!r}")
        return value


Nothing = Annotated[Any, AfterValidator(Neutral(None))]
Zero = Annotated[Any, AfterValidator(Neutral(0))]
NoText = Annotated[Any, AfterValidator(Neutral(""))]
NoList = Annotated[Any, AfterValidator(Neutral([]))]
NoMap = Annotated[Any, AfterValidator(Neutral({}))]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None


class Extension(Strict):
    """What only polymerge understands.

    Attributes:
        sticky: whether a conversation stays with its expert; False routes by the last user turn alone.
        thoughts: put the thinker's thoughts into the answer's `polymerge`.
    """

    sticky: bool = True
    thoughts: bool = False


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn. Empty values of OpenAI's other fields are taken, as its client gives them back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    refusal: NoText = None
    annotations: NoList = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: NoList = None

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None:
            raise ValueError("a message needs content")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, str]:
        """The turn as chat templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


Stop = str | Annotated[list[str], Field(max_length=MOST_STOPS)]


class Generating(Strict):
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
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: NoMap = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Generating:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def usage_at_the_end(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Generating):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    response_format: Annotated[Any, AfterValidator(Neutral({"type": "text"}))] = None
    tools: NoList = None
    tool_choice: Annotated[Any, AfterValidator(Neutral("none", "auto"))] = None
    parallel_tool_calls: Annotated[Any, AfterValidator(Neutral(True, False))] = None
    modalities: Annotated[Any, AfterValidator(Neutral(["text"]))] = None
    store: Annotated[Any, AfterValidator(Neutral(False))] = None
    metadata: NoMap = None
    service_tier: Annotated[Any, AfterValidator(Neutral("auto", "default"))] = None

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs")
        return self

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
            raise ValueError("give either input or messages")
        return self
