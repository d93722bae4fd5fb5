"""What a running model must offer so that the router, the stages, the assessment and the server can use it.

Knows requests and their results. Does not know how a model is loaded or run (`polymerge.engine.local.engine`), and
loads nothing heavy, so that a scripted engine can stand in for a model in tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from ..data.shown import shortened, table
from ..errors import ModelError
from .structure import Structure

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..model.assignment import RowExpert

# A text, to which the tokenizer adds its special tokens, or token ids that hold them already.
Prompt = str | Sequence[int]
Pooling = Literal["last", "mean"]
FloatArray: TypeAlias = "npt.NDArray[np.float32]"
# A turn of a conversation: {"role": "user", "content": "..."}, and what else chat templates know of one.
Message = Mapping[str, Any]
# A temperature under this is greedy: dividing by it leaves the range of numbers.
COLDEST = 1e-4
# OpenAI's own bounds of penalties and biases.
MOST_PENALTY, MOST_BIAS = 2.0, 100.0


_OPTIONAL = ("seed", "repetition_penalty")
_NUMBERS = (
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", *_OPTIONAL
)  # fmt: skip


@dataclass(frozen=True)
class GenerateRequest:
    """One text to go on with.

    Attributes:
        expert: a name, a mixture {name: weight}, or None for the average.
        temperature: 0 takes the likeliest token every time; `top_p`, `top_k`, `min_p` and `seed` then mean nothing.
        stop: texts at which the answer ends; they are not part of it. Special tokens are looked through as well.
        top_k: draw from so many of the likeliest tokens; 0 is all of them.
        min_p: draw from the tokens that are at least so likely, as a share of the likeliest one.
        repetition_penalty: of every token that stands in the prompt or the answer so far; 1 is none, and None is what
            the checkpoint's generation_config.json says.
        presence_penalty, frequency_penalty: taken off the logit of every token that stands in the answer so far, once,
            and as often as it stands there; from -2 to 2, as OpenAI has them.
        logit_bias: token id -> what is added to its logit; from -100 to 100.
        ignore_eos: go on after an end token, up to `max_new_tokens`.
        structure: the form that the answer must have. It ends where the form is whole; `max_new_tokens` may cut it.
        skip_special_tokens: off, the answer's text holds its special tokens, but for the one that ends it.
        deadline: a time of `time.monotonic()` at which the answer is over with what it has, as at `max_new_tokens`;
            engines of this process look at it with every token.

    Raises:
        ModelError: a number that means nothing.
    """

    prompt: Prompt
    expert: RowExpert = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    ignore_eos: bool = False
    structure: Structure | None = None
    skip_special_tokens: bool = True
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real | None if name in _OPTIONAL else Real):
                raise ModelError(f"generate: {name} must be a number, found {value!r}")
        allowed = {
            "max_new_tokens": self.max_new_tokens >= 0 and self.max_new_tokens == int(self.max_new_tokens),
            "seed": self.seed is None or (-(2**63) <= self.seed < 2**64 and self.seed == int(self.seed)),
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": self.greedy or 0 < self.top_p <= 1,
            "top_k": self.greedy or self.top_k >= 0,
            "min_p": self.greedy or 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty is None or 0 < self.repetition_penalty < math.inf,
            "presence_penalty": abs(self.presence_penalty) <= MOST_PENALTY,
            "frequency_penalty": abs(self.frequency_penalty) <= MOST_PENALTY,
            "logit_bias": all(t >= 0 and abs(v) <= MOST_BIAS for t, v in self.logit_bias.items()),
        }
        for name, fits in allowed.items():
            if not fits:
                raise ModelError(f"generate: {name} cannot be {getattr(self, name)}")
        if self.structure and self.ignore_eos:
            raise ModelError(f"ignore_eos: not with {self.structure.name}, whose answer ends where it is whole")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken every time."""
        return self.temperature < COLDEST


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        tokens: written up to the one that ended the answer, and that one too: an end token, or the token that made a
            stop text whole.
        finish: whether it ended, or ran out of `max_new_tokens` or of the context.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish: Literal["stop", "length"]

    def __repr__(self) -> str:
        cut = ", cut" if self.finish == "length" else ""
        return f"Generation({shortened(self.text)!r}, {self.tokens} tokens{cut})"

    def _repr_html_(self) -> str:
        return table("Generation", {"text": self.text, "tokens": self.tokens, "ended by": self.finish})


@dataclass(frozen=True)
class ScoreRequest:
    """How likely is `continuation` after `context`? An empty context is the tokenizer's first special token alone."""

    context: Prompt
    continuation: Prompt
    expert: RowExpert = None


@dataclass(frozen=True)
class Score:
    """log p(continuation | context) in nats, whether every token of it is the likeliest one, and how many there are."""

    log_likelihood: float
    is_greedy: bool
    tokens: int


class Engine(Protocol):
    """A model that runs. Every request of a list has its own expert; results come in the order of the requests.

    Experts may differ in tokenizer, chat template, end tokens, generation settings and context. What asks for these
    takes an `expert` as a request does; without one it is the average's.

    Attributes:
        experts: the names that a request may give; empty for a plain model.
        max_length: of the average's context, in tokens.
        depth: the average's layers; `embed` counts them from 0, the embedding's output, to `depth`.
        fingerprint: changes with anything that results depend on; the key of caches.
    """

    @property
    def experts(self) -> list[str]: ...

    @property
    def max_length(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def max_length_of(self, expert: RowExpert = None) -> int:
        """Of an expert's context, in tokens."""

    def encode(self, text: str, *, special: bool = True, expert: RowExpert = None) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens unless told otherwise."""

    def decode(self, ids: Sequence[int], *, expert: RowExpert = None) -> str:
        """The text of token ids, without special tokens."""

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        expert: RowExpert = None,
        go_on: bool = False,
        tools: Sequence[Message] = (),
    ) -> list[int]:
        """Token ids of a conversation that waits for the model's turn, by the expert's chat template.

        Args:
            go_on: the last message is the beginning of the model's turn, which it goes on with.
            tools: what the model may call, as chat templates know it: {"type": "function", "function": {...}}.
        """

    def chat_template_of(self, expert: RowExpert = None) -> str | None:
        """An expert's chat template, that with tools where it has several; None without one."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Raises ModelError for an unknown expert or a prompt that leaves no room in the context."""

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Contexts are cut on the left where they are too long for the model."""

    def embed(
        self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last"
    ) -> FloatArray:
        """Hidden states of the average (no expert applied): [len(prompts), len(layers), hidden], float32.

        Layers are counted as transformers does: 0 is the embedding's output, -1 the last layer's after the final norm.
        `pooling` takes the last token's state or the mean over all tokens.
        """
