"""The model `staged`: conversations to the pipeline's questions, one batch of them at a time.

Knows what a pipeline is asked and answers (`polymerge.staged.Pipeline`); does not know thinkers or prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..errors import EngineBusyError
from ..router.route import Route
from ..staged import Question
from .errors import ApiError
from .lanes import Lane
from .schema import ChatRequest
from .settings import ServeSettings

if TYPE_CHECKING:
    from ..model.assignment import RowExpert


# Questions of one batch: the pipeline thinks about all before it answers any.
QUESTIONS_AT_ONCE = 16


class Response(Protocol):
    """What it answers; see `polymerge.staged.Response`."""

    @property
    def text(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def thought(self) -> str: ...
    @property
    def expert(self) -> RowExpert: ...
    @property
    def route(self) -> Route | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def thinker_tokens(self) -> int: ...


class Responds(Protocol):
    """Anything that answers in stages; `polymerge.staged.Pipeline` does."""

    def respond(self, questions: Sequence[Question], *, deadline: float | None = None) -> Sequence[Response]:
        """One response a question, in their order."""


class Stages:
    """Questions that wait at the same time are one batch of the pipeline, in a thread of its own.

    Args:
        settings: its `max_questions` counts.
    """

    def __init__(self, pipeline: Responds, settings: ServeSettings) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._lane = Lane("stages", self._respond, QUESTIONS_AT_ONCE)

    async def ask(self, question: Question, *, due: float) -> Response:
        """The answer. Cancelling it drops the question, and what is done for nobody else.

        Args:
            due: a time of `time.monotonic()` after which no thought is begun.

        Raises:
            EngineBusyError: too many wait.
        """
        most = self._settings.max_questions
        if self._lane.waiting >= most:
            raise EngineBusyError(f"{most} questions are waiting for the thinker; try again later")
        return (await self._lane.ask([(question, due)]))[0]

    def _respond(self, asked: Sequence[tuple[Question, float]]) -> Sequence[Response]:
        """With the latest deadline: who has an earlier one no longer waits by then."""
        return self._pipeline.respond([question for question, _ in asked], deadline=max(due for _, due in asked))


def question_of(body: ChatRequest) -> Question:
    """The question of a conversation: the user's only turn, or all turns written below each other. How many tokens its
    answer may have is not said yet.

    Raises:
        ApiError: an option that a staged response does not have.
    """
    refused = {
        "temperature": bool(body.temperature),
        "top_p": body.top_p is not None and body.top_p < 1,
        "n": (body.n or 1) > 1,
        "stop": bool(body.stops),
        "logprobs": bool(body.logprobs),
        "frequency_penalty": bool(body.frequency_penalty),
        "presence_penalty": bool(body.presence_penalty),
        "logit_bias": bool(body.logit_bias),
        "repetition_penalty": body.repetition_penalty not in (None, 1.0),
        "ignore_eos": bool(body.ignore_eos),
        "continue_final_message": body.continue_final_message,
        "tools": bool(body.callable_tools),
    }
    for name, given in refused.items():
        if given:
            raise ApiError(400, f"{name}: a staged response is greedy and whole; leave it out", param=name)
    if len(body.messages) == 1:
        return Question(body.messages[0].text, structure=body.structure)
    turns = [f"{message.role.capitalize()}: {message.text}" for message in body.messages]
    return Question("\n\n".join(turns), structure=body.structure)
