"""POST /v1/answers: rows of the competition, answered as `polymerge compete` answers them, for the kit's own program.

Bare prompts, greedy texts, choices by their summed log-likelihoods. Knows the formatter's contract; the client is
`polymerge.compete.kit_client`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import JSONResponse, Response

from ..data.score import likeliest
from ..engine.base import Engine
from ..model.assignment import RowExpert
from ..staged.exact import exact_scores
from ..staged.formatter import FormatRequest, Formatter, Question
from .errors import ApiError
from .lanes import Lane
from .service import Service

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


Asked = tuple[AnswersRequest, Sequence[RowExpert]]


def kit_routes(service: Service) -> APIRouter:
    """The one endpoint."""
    routes = APIRouter()
    lane: Lane[Asked, list[dict[str, Any]]] = Lane(
        "answers", lambda asked: [_answered(service.engine, *one) for one in asked], 1
    )

    @routes.post("/v1/answers")
    async def answers(body: AnswersRequest, request: Request) -> Response:
        """One answer a row, with the index and the scores of its choices or the tokens of prompt and text."""
        service.chooser.check(body.model)
        if body.max_tokens > service.settings.max_tokens:
            raise ApiError(400, f"max_tokens: at most {service.settings.max_tokens}", param="max_tokens")

        async def answer() -> Response:
            asked = [service.chooser.choose(body.model, [text], sticky=False) for text in body.input]
            experts = [choice.expert for choice in await asyncio.gather(*asked)]
            [data] = await lane.ask([(body, experts)])
            return JSONResponse({"object": "list", "data": data})

        return await service.admitted(request, 1, answer)

    return routes


def _answered(engine: Engine, body: AnswersRequest, experts: Sequence[RowExpert]) -> list[dict[str, Any]]:
    choices = body.choices or [[] for _ in body.input]
    questions = [
        Question(text, tuple(listed), body.max_tokens) for text, listed in zip(body.input, choices, strict=True)
    ]
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
