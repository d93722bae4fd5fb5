"""One submitted request and its answer so far: its tokens become pieces of text until it ends.

Knows tokens, texts and the listener; does not know batches or models.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

from ..errors import DeadlineError, ModelError
from .admission import Demand
from .base import Generation
from .grammar import Matcher
from .sampling import Sampler
from .streaming import Finish, Listener, Piece, StreamRequest, TokenScore
from .text import Decode, TextStream
from .ticket import current_ticket, not_wanted
from .voices import Voice

logger = logging.getLogger(__name__)


class Answer:
    """A `polymerge.engine.streaming.Stream`.

    Args:
        prompt: token ids.
        ends: tokens after which the answer is over.
        matcher: holds it to its form, where the tokens are chosen in this process.

    Attributes:
        made: tokens of the answer so far, the end token among them.
        sampler: what the tokens are chosen by, where they are chosen in this process.
        text_of: token ids -> text.
        over: nothing more is to be made: it ended, failed, or was cancelled.
        failures: batches that broke while this answer ran in them.
        passed: answers that were asked for later and joined a batch before it.
        number: of all answers of this process, in the order in which they were asked for.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        request: StreamRequest,
        prompt: Sequence[int],
        listener: Listener,
        *,
        ends: Collection[int],
        decode: Decode,
        matcher: Matcher | None = None,
    ) -> None:
        self.request, self.prompt, self._listener, self.ends = request, list(prompt), listener, ends
        self.made: list[int] = []
        self.over = False
        self.failures = 0
        self.passed = 0
        self.number = next(self._numbers)
        self.sampler = Sampler(request.generate, prompt, matcher)
        since = time.monotonic() if request.since is None else request.since
        self.due = since + request.seconds if request.seconds is not None else None
        self._ticket = current_ticket()
        self.text_of = decode
        shown = decode if request.generate.skip_special_tokens else lambda ids, special: decode(ids, True)
        self._text = TextStream(shown, request.generate.stop)
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
        return Demand(
            len(self.prompt) + len(self.made), self.longest, self.failures, self.request.score_prompt, self.passed,
            self.number,
        )  # fmt: skip

    def cancel(self) -> None:
        self.over = True

    def fail(self, error: Exception) -> None:
        """Ends with an error, if it has not ended before."""
        if not self.over:
            self.over = True
            self._tell(error)

    def give_up(self) -> None:
        """Ends with an error if it is late, or if nobody waits for it any more."""
        if self.due is not None and time.monotonic() > self.due:
            self.fail(DeadlineError(f"the answer was not whole within {self.request.seconds:g} s"))
        elif self._ticket.over:
            self.fail(not_wanted())

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
        if not self.sampler.take(token):
            asked = self.request.generate.structure
            self.fail(ModelError(f"{asked.name if asked else 'structure'}: this form cannot be held to its end"))
            return
        if score is not None:
            self._scores.append((self._text.read, replace(score, start=self._text.read)))
        if token in self.ends:
            self._end(self._text.finish(), "stop")
            return
        text = self._text.push(token)
        if self._text.stopped:
            self._end(text, "stop")
        elif self.sampler.complete:
            self._end(text + self._text.finish(), "stop")
        elif len(self.made) >= self.request.generate.max_new_tokens or self._is_late():
            text += self._text.finish()
            self._end(text, "stop" if self._text.stopped else "length")
        elif text or self._prompt_scores:
            self._tell(self._piece(text, self._text.shown, None))

    def end(self, finish: Finish) -> None:
        """No more tokens come, as whoever makes them says."""
        if not self.over:
            self._end(self._text.finish(), finish)

    def _is_late(self) -> bool:
        deadline = self.request.generate.deadline
        return deadline is not None and time.monotonic() >= deadline

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


def new_answer(
    request: StreamRequest,
    prompt: Sequence[int],
    listener: Listener,
    *,
    voice: Voice,
    max_length: int | None = None,
    spare: int = 0,
    matcher: Matcher | None = None,
) -> Answer:
    """The answer to a request of a model: its budget is what its own context has room for, whoever runs beside it, and
    what the checkpoint decides is written into it.

    Args:
        voice: its expert's.
        max_length: of the context, in tokens, where that is shorter than the voice's.
        spare: tokens that the context must have room for even where no answer is wanted.
        matcher: as `Answer` takes it.

    Raises:
        ModelError: an empty prompt, or one that leaves no room; a bias of a token that its tokenizer does not have.
    """
    asked, defaults = request.generate, voice.defaults
    max_length = min(voice.max_length, max_length or voice.max_length)
    if not prompt:
        raise ModelError("generate: the prompt is empty")
    room = max_length - len(prompt)
    if room < max(spare, min(1, asked.max_new_tokens)):
        raise ModelError(f"generate: the prompt has {len(prompt)} tokens, the model's context {max_length}")
    if max(asked.logit_bias, default=-1) >= len(voice.tokenizer):
        raise ModelError(f"logit_bias: the model has no token {max(asked.logit_bias)}")
    penalty = defaults.repetition_penalty if asked.repetition_penalty is None else asked.repetition_penalty
    asked = replace(asked, max_new_tokens=min(asked.max_new_tokens, room), repetition_penalty=penalty)
    ends = frozenset[int]() if asked.ignore_eos else defaults.ends
    return Answer(replace(request, generate=asked), prompt, listener, ends=ends, decode=voice.text, matcher=matcher)


def taken(waiting: deque[Answer], places: Sequence[int]) -> list[Answer]:
    """Takes answers out of a queue. Those that stay and stood before one that goes were passed by it.

    Args:
        places: in the queue, in order.
    """
    going = [waiting[place] for place in places]
    for place in reversed(places):
        del waiting[place]
    for number, place in enumerate(places):  # so many that stay stood before it: its place less those that went
        for answer in itertools.islice(waiting, place - number):
            answer.passed += 1
    return going


class Collector:
    """A listener that waits for the whole answer."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._pieces: list[Piece] = []
        self._error: Exception | None = None

    def __call__(self, heard: Piece | Exception) -> None:
        if isinstance(heard, Exception):
            self._error = heard
        else:
            self._pieces.append(heard)
        if self._error or self._pieces[-1].finish:
            self._done.set()

    def result(self, prompt_tokens: int) -> Generation:
        """Blocks until the answer is there. Raises what the engine failed with."""
        self._done.wait()
        if self._error:
            raise self._error
        last = self._pieces[-1]
        return Generation(
            "".join(piece.text for piece in self._pieces), prompt_tokens, last.tokens, last.finish or "stop"
        )
