"""The second stage: the bundle writes the answer, or scores the choices, after a prompt that may hold a thought.

Knows prompts of both kinds and how choices are scored. Does not know how the thought came about
(`polymerge.staged.thinker`) nor whether there should be one (`polymerge.staged.pipeline`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..data.score import likeliest
from ..engine.base import Engine, GenerateRequest, Score, ScoreRequest
from ..engine.structure import Structure
from ..recipe.response import LengthNorm
from .asking import Asking
from .lead import Lead

if TYPE_CHECKING:
    from ..model.assignment import RowExpert


@dataclass(frozen=True)
class Question:
    """What is asked. With `choices` the answer is one of them; without it is free text, of the form that `structure`
    says."""

    text: str
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 64
    structure: Structure | None = None

    @property
    def scored(self) -> bool:
        """Whether the choices are scored; with a structure the answer is written, under it."""
        return bool(self.choices) and self.structure is None


@dataclass(frozen=True)
class FormatRequest:
    """One answer to write, or to choose.

    Attributes:
        prompt: what stands before the answer.
        second: another prompt for the same answer; the choices are then scored after both (`both_agree`).
        asking: how this one is asked; by default as the formatter is told.
    """

    question: Question
    prompt: str
    expert: RowExpert = None
    second: str | None = None
    asking: Asking | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if self.second is None else [self.prompt, self.second]


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        index, scores: of the choices; None and () for free text. Scores are log-likelihoods in nats, normalised as
            the settings say.
        prompt_tokens, tokens: read and written; nothing is written where choices are scored.
        finish: `length` where the text ran out of tokens or of time.
    """

    text: str
    index: int | None = None
    scores: tuple[float, ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0
    finish: Literal["stop", "length"] = "stop"


class Formatter:
    """Answers with an engine.

    Args:
        chat: put the prompt into the model's chat template; off, the text stands as it is, as in the competition.
        lead: what is said before every prompt.
    """

    def __init__(
        self, engine: Engine, *, length_norm: LengthNorm = "none", chat: bool = True, lead: Lead | None = None
    ) -> None:
        self._engine, self._norm, self._asking = engine, length_norm, Asking(chat, lead or Lead())

    def answer(self, asked: Sequence[FormatRequest], *, deadline: float | None = None) -> list[Answer]:
        """One answer a request, in their order. A prompt that is too long for the model loses its beginning.

        Args:
            deadline: a time of `time.monotonic()` at which texts are over with what they have.

        Raises:
            ModelError: an unknown expert.
        """
        texts = [n for n, one in enumerate(asked) if not one.question.scored]
        closed = [n for n, one in enumerate(asked) if one.question.scored]
        answers = dict(zip(texts, self._write([asked[n] for n in texts], deadline), strict=True))
        answers |= dict(zip(closed, self._choose([asked[n] for n in closed]), strict=True))
        return [answers[n] for n in range(len(asked))]

    def work(self, request: FormatRequest) -> tuple[int, int]:
        """Tokens that an answer reads, its choices among them, and at most writes."""
        question, encode = request.question, self._engine.encode
        read = sum(len(self._context(request, prompt)) for prompt in request.prompts)
        if not question.scored:
            return read, question.max_new_tokens
        choices = sum(len(encode(choice, special=False, expert=request.expert)) for choice in question.choices)
        return read + choices * len(request.prompts), 0

    def fits(self, request: FormatRequest) -> bool:
        """Whether the prompt and the longest answer fit the model's context."""
        used = len(self._ids(request, request.prompt)) + self._longest_answer(request)
        return used <= self._engine.max_length_of(request.expert)

    def _write(self, asked: Sequence[FormatRequest], deadline: float | None) -> list[Answer]:
        requests = [
            GenerateRequest(
                self._context(one, one.prompt), one.expert, max_new_tokens=one.question.max_new_tokens,
                structure=one.question.structure, deadline=deadline,
            )
            for one in asked
        ]  # fmt: skip
        return [Answer(g.text, None, (), g.prompt_tokens, g.tokens, g.finish) for g in self._engine.generate(requests)]

    def _choose(self, asked: Sequence[FormatRequest]) -> list[Answer]:
        contexts = [[self._context(one, prompt) for prompt in one.prompts] for one in asked]
        requests = [
            ScoreRequest(context, choice, one.expert)
            for one, prompts in zip(asked, contexts, strict=True)
            for context in prompts
            for choice in one.question.choices
        ]
        scores = iter(self._engine.loglikelihood(requests))
        answers = []
        for one, prompts in zip(asked, contexts, strict=True):
            choices = one.question.choices
            rows = [[self._score(next(scores), choice) for choice in choices] for _ in prompts]
            total = tuple(sum(column) / len(prompts) for column in zip(*rows, strict=True))
            best = likeliest(total)  # the first of equals, as in the kit
            answers.append(Answer(choices[best], best, total, sum(map(len, prompts))))
        return answers

    def _score(self, score: Score, choice: str) -> float:
        length = {"none": 1, "tokens": score.tokens, "characters": len(choice)}[self._norm]
        return score.log_likelihood / length

    def _ids(self, request: FormatRequest, prompt: str) -> list[int]:
        asking = request.asking or self._asking
        if asking.chat:
            return self._engine.chat_prompt(asking.lead.messages(prompt), expert=request.expert)
        return self._engine.encode(asking.lead.before(prompt), expert=request.expert)

    def _context(self, request: FormatRequest, prompt: str) -> list[int]:
        room = max(1, self._engine.max_length_of(request.expert) - self._longest_answer(request))
        return self._ids(request, prompt)[-room:]

    def _longest_answer(self, request: FormatRequest) -> int:
        question, encode = request.question, self._engine.encode
        if not question.scored:
            return question.max_new_tokens
        choices = (len(encode(choice, special=False, expert=request.expert)) for choice in question.choices)
        return max(choices, default=question.max_new_tokens)
