"""An engine that counts what passes through it: tokens read, tokens written and seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..base import Engine, GenerateRequest, Generation, Score, ScoreRequest
from .forwarding import ForwardingEngine


class MeteredEngine(ForwardingEngine):
    """Wraps an engine.

    Attributes:
        read: tokens of prompts, contexts and scored continuations so far. A context that several continuations of one
            call share counts once.
        written: tokens generated so far.
        seconds: inside the engine so far.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.reset()

    def reset(self) -> None:
        """Counts from nothing again."""
        self.read, self.written, self.seconds = 0, 0, 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens read and written for every second; None before there was anything to do."""
        return (self.read + self.written) / self.seconds if self.seconds else None

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As in the contract."""
        began = time.perf_counter()
        generations = self._engine.generate(requests)
        self.seconds += time.perf_counter() - began
        self.read += sum(generation.prompt_tokens for generation in generations)
        self.written += sum(generation.tokens for generation in generations)
        return generations

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """As in the contract."""
        began = time.perf_counter()
        scores = self._engine.loglikelihood(requests)
        self.seconds += time.perf_counter() - began
        contexts = {
            (r.context if isinstance(r.context, str) else tuple(r.context), str(r.expert)): r.expert for r in requests
        }
        self.read += sum(
            len(self.encode(context, expert=expert) if isinstance(context, str) else context)
            for (context, _), expert in contexts.items()
        )
        self.read += sum(score.tokens for score in scores)
        return scores
