"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..engine.mixture import expert_of
from .answering import calling_of, prompt_of
from .errors import ApiError, about
from .routing import AUTO, STAGED, Choice
from .schema import ChatRequest, CompletionRequest
from .service import Service
from .shapes import ChatShape, CompletionShape


def completion_routes(service: Service) -> APIRouter:
    """Both endpoints."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation."""
        answers = service.check_limits(body, body.wanted_tokens, fields=body.fields)
        if body.model == STAGED:
            return await service.admitted(request, 1, lambda: service.respond_in_stages(request, body))

        async def answer() -> Response:
            turns = [message.text for message in body.messages if message.role == "user"]
            choice = await service.choose(request, body.model, turns, sticky=body.polymerge.sticky)
            calling = calling_of(service.engine, body, choice.expert)
            prompt = await service.tokens(lambda: prompt_of(service.engine, body, choice.expert, calling), "messages")
            requests = service.stream_requests(
                request,
                body,
                [prompt],
                [choice],
                tokens=body.wanted_tokens,
                logprobs=body.wanted_logprobs,
                calling=calling,
                fields=body.fields,
            )
            scored, stream = bool(body.logprobs), bool(body.stream)
            shape = ChatShape(body.model, service.engine.fingerprint, scored=scored, stream=stream, calling=calling)
            return await service.respond(request, body, shape, requests, [choice])

        return await service.admitted(request, answers, answer)

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Goes on with texts or token ids; with `echo` and `logprobs` it scores them, as lm-eval wants it."""
        if body.model == STAGED:
            raise ApiError(400, "model: staged answers conversations; use /v1/chat/completions", param="model")
        answers = service.check_limits(body, body.max_tokens, len(body.prompts), fields=body.fields)

        async def answer() -> Response:
            engine = service.engine
            named = None if body.model == AUTO else expert_of(body.model)
            # the router reads text; token ids are the average's where no expert is named
            with about("prompt"):
                texts = await service.each(
                    body.prompts, lambda given: given if isinstance(given, str) else engine.decode(given, expert=named)
                )
            choices = await asyncio.gather(*[service.choose(request, body.model, [text]) for text in texts])
            prompts = [await _ids(service, *pair) for pair in zip(body.prompts, choices, strict=True)]
            requests = service.stream_requests(
                request,
                body,
                prompts,
                choices,
                tokens=16 if body.max_tokens is None else body.max_tokens,
                logprobs=body.logprobs,
                score_prompt=bool(body.echo) and body.logprobs is not None,
                fields=body.fields,
            )
            echoes = [text for text in texts for _ in range(body.n or 1)] if body.echo else None
            shape = CompletionShape(body.model, engine.fingerprint, scored=body.logprobs is not None, echoes=echoes)
            return await service.respond(request, body, shape, requests, choices)

        return await service.admitted(request, answers, answer)

    return routes


async def _ids(service: Service, given: str | list[int], choice: Choice) -> list[int]:
    if isinstance(given, str):
        return await service.tokens(lambda: service.engine.encode(given, expert=choice.expert), "prompt")
    return given
