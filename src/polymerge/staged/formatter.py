"""The second stage: the bundle writes the answer, or scores the choices, after a prompt that may hold a thought.

Knows prompts of both kinds and how choices are scored. Does not know how the thought came about
(`polymerge.staged.thinker`) nor whether there should be one (`polymerge.staged.pipeline`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.score import likeliest
from ..engine.base import Engine, GenerateRequest, Score, ScoreRequest
from ..recipe.response import LengthNorm

if TYPE_CHECKING:
    from ..model.assignment import RowExpert


@dataclass(frozen=True)
class Question:
    """What is asked. With `choices` the answer is one of them, without it is free text."""

    text: str
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Job:
    """One answer to write.

    Attributes:
        prompt: what stands before the answer.
        second: another prompt for the same answer; the choices are then scored after both (`both_agree`).
    """

    question: Question
    prompt: str
    expert: RowExpert = None
    second: str | None = None


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        index, scores: of the choices; None and () for free text. Scores are log-likelihoods in nats, normalised as
            the settings say.
        prompt_tokens, tokens: read and written; nothing is written where choices are scored.
    """

    text: str
    index: int | None = None
    scores: tuple[float, ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0


class Formatter:
    """Answers jobs with an engine.

    Args:
        chat: put the prompt into the model's chat template; off, the text stands as it is, as in the competition.
    """

    def __init__(self, engine: Engine, *, length_norm: LengthNorm = "none", chat: bool = True) -> None:
        self._engine, self._norm, self._chat = engine, length_norm, chat

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """One answer a job, in their order. A prompt that is too long for the model loses its beginning.

        Raises:
            ModelError: an unknown expert.
        """
        texts = [n for n, job in enumerate(jobs) if not job.question.choices]
        closed = [n for n, job in enumerate(jobs) if job.question.choices]
        found = dict(zip(texts, self._write([jobs[n] for n in texts]), strict=True))
        found |= dict(zip(closed, self._choose([jobs[n] for n in closed]), strict=True))
        return [found[n] for n in range(len(jobs))]

    def fits(self, job: Job) -> bool:
        """Whether the prompt and the longest answer fit the model's context."""
        return len(self._ids(job.prompt)) + self._longest_answer(job.question) <= self._engine.max_length

    def _write(self, jobs: Sequence[Job]) -> list[Answer]:
        requests = [
            GenerateRequest(self._context(job, job.prompt), job.expert, max_new_tokens=job.question.max_new_tokens)
            for job in jobs
        ]
        return [Answer(g.text, None, (), g.prompt_tokens, g.tokens) for g in self._engine.generate(requests)]

    def _choose(self, jobs: Sequence[Job]) -> list[Answer]:
        prompts = [[job.prompt] if job.second is None else [job.prompt, job.second] for job in jobs]
        contexts = [[self._context(job, prompt) for prompt in own] for job, own in zip(jobs, prompts, strict=True)]
        requests = [
            ScoreRequest(context, choice, job.expert)
            for job, own in zip(jobs, contexts, strict=True)
            for context in own
            for choice in job.question.choices
        ]
        scores = iter(self._engine.loglikelihood(requests))
        answers = []
        for job, own in zip(jobs, contexts, strict=True):
            choices = job.question.choices
            rows = [[self._score(next(scores), choice) for choice in choices] for _ in own]
            total = tuple(sum(column) / len(own) for column in zip(*rows, strict=True))
            best = likeliest(total)  # the first of equals, as in the kit
            answers.append(Answer(choices[best], best, total, sum(map(len, own))))
        return answers

    def _score(self, score: Score, choice: str) -> float:
        length = {"none": 1, "tokens": score.tokens, "characters": len(choice)}[self._norm]
        return score.log_likelihood / length

    def _ids(self, prompt: str) -> list[int]:
        if self._chat:
            return self._engine.chat_prompt([{"role": "user", "content": prompt}])
        return self._engine.encode(prompt)

    def _context(self, job: Job, prompt: str) -> list[int]:
        room = max(1, self._engine.max_length - self._longest_answer(job.question))
        return self._ids(prompt)[-room:]

    def _longest_answer(self, question: Question) -> int:
        choices = (len(self._engine.encode(choice, special=False)) for choice in question.choices)
        return max(choices, default=question.max_new_tokens)
