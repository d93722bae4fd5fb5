"""One submitted request and its answer so far: its tokens become pieces of text until it ends.

Knows tokens, texts and the listener; does not know batches or models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence

import torch

from .admission import Demand
from .streaming import Finish, Listener, Piece, StreamRequest, TokenScore
from .text import TextStream

logger = logging.getLogger(__name__)


class Answer:
    """A `polymerge.engine.streaming.Stream`.

    Args:
        prompt: token ids.
        ends: tokens after which the answer is over.
        decode: token ids -> text.

    Attributes:
        made: tokens of the answer so far.
        over: nothing more is to be made: it ended, failed, or was cancelled.
        failures: batches that broke while this answer ran in them.
    """

    def __init__(
        self,
        request: StreamRequest,
        prompt: Sequence[int],
        listener: Listener,
        *,
        ends: Collection[int],
        decode: Callable[[list[int]], str],
    ) -> None:
        self.request, self.prompt, self._listener, self._ends = request, list(prompt), listener, ends
        self.made: list[int] = []
        self.over = False
        self.failures = 0
        self.generator = torch.Generator()
        if request.generate.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.generate.seed)
        self.due = time.monotonic() + request.seconds if request.seconds is not None else None
        self._text = TextStream(decode, request.generate.stop)
        self._scores: list[tuple[int, TokenScore]] = []  # where a token's text begins, and its score
        self._prompt_scores: tuple[TokenScore, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def tokens(self) -> list[int]:
        """What the model has to read to go on."""
        return self.prompt + self.made

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer at most."""
        return len(self.prompt) + self.request.generate.max_new_tokens

    @property
    def demand(self) -> Demand:
        """What it takes of a batch that it joins now."""
        return Demand(len(self.prompt) + len(self.made), self.longest, self.failures, self.request.score_prompt)

    def cancel(self) -> None:
        self.over = True

    def fail(self, error: Exception) -> None:
        """Ends with an error, if it has not ended before."""
        if not self.over:
            self.over = True
            self._tell(error)

    def take_prompt(self, scores: Sequence[TokenScore]) -> None:
        """The prompt was read. An answer of no tokens is over with it."""
        self._prompt_scores = tuple(scores)
        if self.request.generate.max_new_tokens == 0 and not self.over:
            self._end("", "length")

    def take(self, token: int, score: TokenScore | None) -> None:
        """One more token."""
        if self.over:
            return
        self.made.append(token)
        if score is not None:
            self._scores.append((self._text.read, score))
        if token in self._ends:
            self._end(self._text.finish(), "stop")
            return
        text = self._text.push(token)
        if self._text.stopped:
            self._end(text, "stop")
        elif len(self.made) >= self.request.generate.max_new_tokens:
            text += self._text.finish()
            self._end(text, "stop" if self._text.stopped else "length")
        elif text or self._prompt_scores:
            self._tell(self._piece(text, self._text.shown, None))

    def _end(self, text: str, finish: Finish) -> None:
        self.over = True
        # a token that begins behind the cut belongs to the stop text
        until = self._text.shown if self._text.stopped else self._text.shown + 1
        self._tell(self._piece(text, until, finish))

    def _piece(self, text: str, until: int, finish: Finish | None) -> Piece:
        """Scores go out with the text that their tokens begin in."""
        scores = tuple(score for start, score in self._scores if start < until)
        self._scores = [(start, score) for start, score in self._scores if start >= until]
        prompt_scores, self._prompt_scores = self._prompt_scores, ()
        return Piece(text, len(self.made), finish, scores, prompt_scores)

    def _tell(self, heard: Piece | Exception) -> None:
        try:
            self._listener(heard)
        except Exception:  # a listener that is gone must not stop the others' answers
            self.over = True
            logger.warning("a listener failed; its answer was dropped", exc_info=True)
