"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from .answering import calling_of, prompt_of
from .errors import ApiError
from .routing import STAGED, Choice
from .schema import ChatRequest, CompletionRequest
from .service import Service
from .shapes import ChatShape, CompletionShape


def completion_routes(service: Service) -> APIRouter:
    """Both endpoints."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation."""
        service.chooser.check(body.model)
        if body.model == STAGED:
            return await service.respond_in_stages(request, body)
        turns = [message.text for message in body.messages if message.role == "user"]
        choice = await service.choose(request, body.model, turns, sticky=body.polymerge.sticky)
        calling = calling_of(service.engine, body, choice.expert)
        prompt = await service.tokens(lambda: prompt_of(service.engine, body, choice.expert, calling), "messages")
        requests = service.stream_requests(
            body, [prompt], [choice], tokens=body.wanted_tokens, logprobs=body.wanted_logprobs, calling=calling
        )
        shape = ChatShape(
            body.model,
            service.engine.fingerprint,
            scored=bool(body.logprobs),
            stream=bool(body.stream),
            calling=calling,
        )
        return await service.respond(request, body, shape, requests, [choice])

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Goes on with texts or token ids; with `echo` and `logprobs` it scores them, as lm-eval wants it."""
        if body.model == STAGED:
            raise ApiError(400, "model: staged answers conversations; use /v1/chat/completions", param="model")
        engine, prompts, texts, choices = service.engine, [], [], []
        named = body.model if body.model in engine.experts else None
        for given in body.prompts:
            # the router reads text; token ids are the average's where no expert is named
            text = given if isinstance(given, str) else engine.decode(given, expert=named)
            choice = await service.choose(request, body.model, [text])
            choices.append(choice)
            prompts.append(await _ids(service, given, choice))
            texts.append(text)
        requests = service.stream_requests(
            body,
            prompts,
            choices,
            tokens=16 if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            score_prompt=bool(body.echo) and body.logprobs is not None,
        )
        echoes = [text for text in texts for _ in range(body.n or 1)] if body.echo else None
        shape = CompletionShape(body.model, engine.fingerprint, scored=body.logprobs is not None, echoes=echoes)
        return await service.respond(request, body, shape, requests, choices)

    return routes


async def _ids(service: Service, given: str | list[int], choice: Choice) -> list[int]:
    if isinstance(given, str):
        return await service.tokens(lambda: service.engine.encode(given, expert=choice.expert), "prompt")
    return given
