"""POST /v1/embeddings and /v1/route: what the router judges by, and where it would send a request."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter

from ..engine.base import FloatArray
from ..router.route import Routes
from .errors import ApiError
from .schema import EmbeddingRequest, RouteRequest
from .service import Service, in_thread
from .shapes import usage


def judgement_routes(service: Service, router: Routes | None) -> APIRouter:
    """Both endpoints."""
    routes = APIRouter()

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        """The vectors that the router judges by; without a router, the average's state after the last token."""
        vectors, tokens, truncated = await in_thread(lambda: _embedded(service, router, body))
        data = [
            {"object": "embedding", "index": n, "embedding": _encoded(vector, body.encoding_format)}
            for n, vector in enumerate(vectors)
        ]
        spent = usage(tokens, 0)
        del spent["completion_tokens"]
        answer = {"object": "list", "data": data, "model": body.model, "usage": spent}
        # tokens that were cut out of each text's middle, where any were
        return {**answer, "polymerge": {"truncated": truncated}} if any(truncated) else answer

    @routes.post("/v1/route")
    async def route(body: RouteRequest) -> dict[str, Any]:
        """Where texts, or a conversation, would go. Nothing is generated."""
        if body.messages is not None:
            turns = [message.text for message in body.messages if message.role == "user"]
            choice = await in_thread(lambda: service.chooser.choose("auto", turns, sticky=body.polymerge.sticky))
            return {"object": "route", "polymerge": choice.body, "route": choice.route and choice.route.to_json()}
        texts = [body.input] if isinstance(body.input, str) else body.input or []
        if not all(text.strip() for text in texts):
            raise ApiError(400, "input: an empty text cannot be routed", param="input")
        chosen = await in_thread(lambda: service.chooser.routes(texts))
        return {"object": "list", "data": [route.to_json() for route in chosen]}

    return routes


def _embedded(service: Service, router: Routes | None, body: EmbeddingRequest) -> tuple[FloatArray, int, list[int]]:
    service.chooser.check(body.model)
    engine = service.engine
    ids = [engine.encode(given) if isinstance(given, str) else given for given in body.inputs]
    embedder = getattr(router, "embedder", None)  # `polymerge.router.Router` has one, other routers need not
    if embedder is None:
        return engine.embed(ids)[:, 0], sum(map(len, ids)), []
    texts = [given if isinstance(given, str) else engine.decode(given) for given in body.inputs]
    if not all(text.strip() for text in texts):
        raise ApiError(400, "input: an empty text has no embedding", param="input")
    vectors, truncated = embedder.embed(texts)
    return vectors, sum(map(len, ids)), truncated


def _encoded(vector: FloatArray, kind: str | None) -> list[float] | str:
    if kind == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()
    return [float(value) for value in vector]
