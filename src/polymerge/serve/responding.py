"""The endpoint `/v1/responses`: from a request to its answer, whole or as events."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..engine.streaming import Piece
from .answering import calling_of, prompt_of
from .answers import Run
from .errors import ApiError, Fields, told
from .items import Items, spent
from .responses import ResponseRequest, echoed
from .routing import STAGED
from .schema import ChatRequest
from .service import SSE_HEADERS, Service
from .shapes import event

logger = logging.getLogger("polymerge.serve")
FIELDS = Fields("input", "max_output_tokens")


def response_routes(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/responses")
    async def respond(body: ResponseRequest, request: Request) -> Response:
        """An answer to a conversation, as items."""
        service.chooser.check(body.model)
        if body.model == STAGED:
            raise ApiError(400, "model: staged answers at /v1/chat/completions", param="model")
        chat = body.as_chat()
        places = service.check_limits(chat, body.max_output_tokens, fields=FIELDS)
        return await service.admitted(request, places, lambda: _answer(service, request, body, chat))

    return routes


async def _answer(service: Service, request: Request, body: ResponseRequest, chat: ChatRequest) -> Response:
    turns = [message.text for message in chat.messages if message.role == "user"]
    choice = await service.choose(request, body.model, turns, sticky=body.polymerge.sticky)
    calling = calling_of(service.engine, chat, choice.expert)
    if calling and body.structure:
        raise ApiError(400, "text.format: not together with tools; leave one of both out", param="text.format")
    prompt = await service.tokens(lambda: prompt_of(service.engine, chat, choice.expert, calling), "input")
    requests = service.stream_requests(
        request, chat, [prompt], [choice], tokens=body.max_output_tokens, logprobs=None, calling=calling,
        structure=body.structure, fields=FIELDS,
    )  # fmt: skip
    run = service.run(request, requests)
    read = sum(run.prompt_tokens)
    service.metrics.tokens.labels("prompt").inc(read)
    items, extra = Items(echoed(body), calling), {"polymerge": choice.body}
    if body.stream:
        source = _events(run, items, read, extra)
        return StreamingResponse(source, media_type="text/event-stream", headers=SSE_HEADERS | choice.headers)
    [answer] = await run.whole()
    for _ in items.add(Piece(answer.text, answer.tokens, answer.finish)):
        pass
    whole = items.end(spent(read, answer.tokens), answer.finish, extra)["response"]
    return JSONResponse(whole, headers=choice.headers)


async def _events(run: Run, items: Items, read: int, extra: dict[str, Any]) -> AsyncIterator[bytes]:
    try:
        for said in items.begin():
            yield event(said, said["type"])
        async for _, piece in run:
            for said in items.add(piece):
                yield event(said, said["type"])
        [answer] = run.answers
        last = items.end(spent(read, answer.tokens), answer.finish, extra)
        yield event(last, last["type"])
    except Exception as error:
        known = told(error)
        if known.status == 500:
            logger.exception("an answer failed")
        yield event({"type": "error", "sequence_number": 0, **known.body["error"]}, "error")
    finally:
        run.close()
