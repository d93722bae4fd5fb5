"""POST /v1/embeddings and /v1/route: what the router judges by, and where it would send a request."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..engine.base import FloatArray, Prompt
from ..router.route import Routes
from .errors import ApiError, about
from .lanes import Lane
from .routing import TEXTS_AT_ONCE
from .schema import EmbeddingRequest, RouteRequest
from .service import Service
from .shapes import usage


class Embedding(NamedTuple):
    """One text's vector, and how many of its tokens were cut out to fit."""

    vector: FloatArray
    cut: int


def judgement_routes(service: Service, router: Routes | None) -> APIRouter:
    """Both endpoints."""
    routes, embed = APIRouter(), embedding_lane(service, router)

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """The vectors that the router judges by; without a router, the average's state after the last token."""
        service.chooser.check(body.model)
        _check_count(service, body.inputs)
        return await service.admitted(request, 1, lambda: _embedded(service, embed, body, by_text=router is not None))

    @routes.post("/v1/route")
    async def route(body: RouteRequest, request: Request) -> Response:
        """Where texts, or a conversation, would go. Nothing is generated."""
        texts = [body.input] if isinstance(body.input, str) else body.input or []
        _check_count(service, texts)
        if not all(text.strip() for text in texts):
            raise ApiError(400, "input: an empty text cannot be routed", param="input")

        async def routed() -> Response:
            if body.messages is None:
                routes = await service.chooser.routes(texts)
                return JSONResponse({"object": "list", "data": [route.to_json() for route in routes]})
            turns = [message.text for message in body.messages if message.role == "user"]
            choice = await service.chooser.choose("auto", turns, sticky=body.polymerge.sticky)
            one = choice.route and choice.route.to_json()
            return JSONResponse({"object": "route", "polymerge": choice.body, "route": one})

        return await service.admitted(request, 1, routed)

    return routes


def embedding_lane(service: Service, router: Routes | None) -> Lane[Prompt, Embedding]:
    """Embeds texts as the router does, or without one, token ids by the engine."""
    embedder = getattr(router, "embedder", None)  # `polymerge.router.Router` has one, other routers need not

    def embed(given: Sequence[Prompt]) -> list[Embedding]:
        if embedder is None:
            return [Embedding(vector, 0) for vector in service.engine.embed(given)[:, 0]]
        made = embedder.embed(given)
        return [Embedding(*pair) for pair in zip(made.vectors, made.truncated, strict=True)]

    return Lane("embeddings", embed, TEXTS_AT_ONCE)


def _check_count(service: Service, texts: Sequence[Any]) -> None:
    if len(texts) > service.settings.max_texts:
        raise ApiError(400, f"input: at most {service.settings.max_texts} texts a request", param="input")


async def _embedded(
    service: Service, embed: Lane[Prompt, Embedding], body: EmbeddingRequest, *, by_text: bool
) -> Response:
    engine = service.engine
    with about("input"):
        ids = await service.each(body.inputs, lambda given: engine.encode(given) if isinstance(given, str) else given)
        items: list[Prompt] = list(ids)
        if by_text:
            items = await service.each(
                body.inputs, lambda given: given if isinstance(given, str) else engine.decode(given)
            )
            if not all(isinstance(text, str) and text.strip() for text in items):
                raise ApiError(400, "input: an empty text has no embedding", param="input")
        made = await embed.ask(items)
    data = [
        {"object": "embedding", "index": n, "embedding": _encoded(one.vector, body.encoding_format)}
        | ({"cut_tokens": one.cut} if one.cut else {})
        for n, one in enumerate(made)
    ]
    spent = usage(sum(map(len, ids)), 0)
    del spent["completion_tokens"]
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": spent})


def _encoded(vector: FloatArray, kind: str | None) -> list[float] | str:
    if kind == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()
    return [float(value) for value in vector]
