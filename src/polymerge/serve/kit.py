"""POST /v1/answers: rows of the competition, answered as `polymerge compete` answers them, for the kit's own program.

Bare prompts, greedy texts, choices by their summed log-likelihoods. Knows the formatter's contract; the client is
`polymerge.compete.kit_client`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..data.score import likeliest
from ..engine.base import Engine
from ..staged.exact import exact_scores
from ..staged.formatter import FormatRequest, Formatter, Question
from .errors import ApiError
from .service import Service, in_thread

MOST_ROWS, MOST_CHOICES = 512, 1000
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)]


class AnswersRequest(BaseModel):
    """Rows to answer: all with choices, or all without."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_ROWS)]
    choices: list[Choices] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 64
    exact: bool = False

    @model_validator(mode="after")
    def _fit_together(self) -> AnswersRequest:
        if self.choices is not None and len(self.choices) != len(self.input):
            raise ValueError("choices: one list for every input")
        return self


def kit_routes(service: Service) -> APIRouter:
    """The one endpoint."""
    routes = APIRouter()

    @routes.post("/v1/answers")
    async def answers(body: AnswersRequest) -> dict[str, Any]:
        """One answer a row, with the index and the scores of its choices or the tokens of prompt and text."""
        if body.max_tokens > service.settings.max_tokens:
            raise ApiError(400, f"max_tokens: at most {service.settings.max_tokens}", param="max_tokens")
        return {"object": "list", "data": await in_thread(lambda: _answered(service, body))}

    return routes


def _answered(service: Service, body: AnswersRequest) -> list[dict[str, Any]]:
    engine: Engine = service.engine
    choices = body.choices or [[] for _ in body.input]
    questions = [
        Question(text, tuple(listed), body.max_tokens) for text, listed in zip(body.input, choices, strict=True)
    ]
    experts = [service.chooser.choose(body.model, [q.text], sticky=False).expert for q in questions]
    pairs = list(zip(questions, experts, strict=True))
    if body.exact and body.choices is not None:
        rows = [exact_scores(engine, question.text, question.choices, expert) for question, expert in pairs]
        return [{"index": likeliest(row), "scores": list(row)} for row in rows]
    asked = [FormatRequest(question, question.text, expert) for question, expert in pairs]
    answered = Formatter(engine, chat=False).answer(asked)
    return [
        {"index": answer.index, "scores": list(answer.scores)}
        if answer.index is not None
        else {"text": answer.text, "ids": _ids(engine, request, answer.text), "finish": answer.finish}
        for request, answer in zip(asked, answered, strict=True)
    ]


def _ids(engine: Engine, request: FormatRequest, text: str) -> list[int]:
    written = engine.encode(text, special=False, expert=request.expert)
    return [*engine.encode(request.prompt, expert=request.expert), *written]
