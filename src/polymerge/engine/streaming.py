"""What a running model must offer beyond `Engine` so that a server can answer many people at once.

Requests come at any time and their answers come piece by piece. Knows requests and pieces; does not know how an engine
puts them into batches (`polymerge.engine.local.batching`), and loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from .base import Engine, GenerateRequest
from .defaults import GenerationDefaults

if TYPE_CHECKING:
    from ..model.assignment import RowExpert

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class StreamRequest:
    """A text to go on with, and what to tell on the way.

    Attributes:
        generate: as for `Engine.generate`; `max_new_tokens` may be 0 where only the prompt's scores are asked for.
        logprobs: tell every token's log-probability and so many of the likeliest alternatives; None tells nothing.
        score_prompt: tell them for the prompt's tokens too, in the first piece.
        seconds: the answer must be whole so long after it was asked for; None waits for ever.
        since: the time of `time.monotonic()` at which it was asked for; None is when it is submitted.
    """

    generate: GenerateRequest
    logprobs: int | None = None
    score_prompt: bool = False
    seconds: float | None = None
    since: float | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token with its log-probability in nats; None for a prompt's first token.

    Attributes:
        text: the token alone; it may be a part of a character.
        top: the likeliest tokens at this place, the likeliest first: (text, log-probability).
        top_ids: their numbers, where they are known: several tokens may have one text (parts of characters).
        start: where its text begins in the answer's, or a prompt's token's in the prompt's, in characters; None where
            that is not known.
    """

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()
    top_ids: tuple[int, ...] = ()
    start: int | None = None


@dataclass(frozen=True)
class Piece:
    """What has been added to an answer. The texts of all pieces make up the answer; only the last one has `finish`.

    Attributes:
        tokens: written so far; in the last piece as in `Generation`.
        scores: of the tokens whose text begins in this piece, where asked for.
        prompt_scores: of the prompt, in the first piece, where asked for.
    """

    text: str
    tokens: int
    finish: Finish | None = None
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()


# What a listener hears: pieces, the last of which has `finish`, or one error after which nothing comes.
Listener = Callable[[Piece | Exception], None]


class Stream(Protocol):
    """A submitted request."""

    @property
    def prompt_tokens(self) -> int: ...

    def cancel(self) -> None:
        """Stops the answer where it is, at the next token at the latest; nothing is heard afterwards."""


@dataclass(frozen=True)
class EngineState:
    """What an engine is doing: `ready` takes requests, `restarting` will again soon, `stopped` never."""

    status: Literal["ready", "restarting", "stopped"]
    running: int = 0
    waiting: int = 0


class StreamingEngine(Engine, Protocol):
    """An engine that takes requests while others run."""

    def defaults_of(self, expert: RowExpert = None) -> GenerationDefaults:
        """What an expert's checkpoint says of a request that leaves a setting out."""

    @property
    def state(self) -> EngineState: ...

    def submit(self, requests: Sequence[StreamRequest], listeners: Sequence[Listener]) -> list[Stream]:
        """Takes all of them or none. A listener is called from a thread of the engine and must return at once.

        Raises:
            ModelError: an unknown expert, or a prompt that leaves no room in the context.
            EngineBusyError: the queue is full. EngineDownError: it restarts or has stopped.
        """

    def close(self, seconds: float | None = None) -> None:
        """Refuses new requests, finishes what was taken (for so long at most), then stops."""
