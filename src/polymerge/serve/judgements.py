"""The other endpoints: models, embeddings, routes, health, metrics and the playground's page."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from ..engine.base import FloatArray
from ..router.route import Routes
from .errors import RETRY_SECONDS, ApiError
from .playground import HEADERS, page
from .schema import EmbeddingRequest, RouteRequest
from .service import Service, in_thread
from .shapes import usage


def other_routes(service: Service, router: Routes | None) -> APIRouter:
    """All of them."""
    routes = APIRouter()
    began = int(time.time())

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What `model` may be."""
        return {"object": "list", "data": [_model(service, name, began) for name in service.chooser.models]}

    @routes.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        """One of them."""
        service.chooser.check(model)
        return _model(service, model, began)

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        """The vectors that the router judges by; without a router, the average's state after the last token."""
        vectors, tokens = await in_thread(lambda: _embedded(service, router, body))
        data = [
            {"object": "embedding", "index": n, "embedding": _encoded(vector, body.encoding_format)}
            for n, vector in enumerate(vectors)
        ]
        spent = usage(tokens, 0)
        del spent["completion_tokens"]
        return {"object": "list", "data": data, "model": body.model, "usage": spent}

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
        found = await in_thread(lambda: service.chooser.routes(texts))
        return {"object": "list", "data": [one.to_json() for one in found]}

    @routes.get("/health")
    async def health() -> Response:
        """Whether this process is of use; after 503 it should be started anew."""
        stopped = service.ready and service.engine.state.status == "stopped"
        return JSONResponse({"status": "stopped" if stopped else "ok"}, status_code=503 if stopped else 200)

    @routes.get("/ready")
    async def ready() -> Response:
        """Whether new requests are welcome now."""
        status = service.engine.state.status if service.ready else "draining"
        if status == "ready":
            return JSONResponse({"status": status})
        return JSONResponse({"status": status}, status_code=503, headers={"retry-after": str(RETRY_SECONDS)})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/", include_in_schema=False)
    async def playground(request: Request) -> Response:
        """A page to try the experts."""
        return Response(page(), media_type="text/html", headers=HEADERS)

    return routes


def _model(service: Service, name: str, created: int) -> dict[str, Any]:
    """`max_model_len` is what vLLM calls the context; `max_tokens` is the server's limit for one answer."""
    limits = {"max_model_len": service.engine.max_length, "max_tokens": service.settings.max_tokens}
    return {"id": name, "object": "model", "created": created, "owned_by": "polymerge"} | limits


def _embedded(service: Service, router: Routes | None, body: EmbeddingRequest) -> tuple[FloatArray, int]:
    service.chooser.check(body.model)
    engine = service.engine
    ids = [engine.encode(given) if isinstance(given, str) else given for given in body.inputs]
    embedder = getattr(router, "embedder", None)  # `polymerge.router.Router` has one, other routers need not
    if embedder is None:
        return engine.embed(ids)[:, 0], sum(map(len, ids))
    texts = [given if isinstance(given, str) else engine.decode(given) for given in body.inputs]
    if not all(text.strip() for text in texts):
        raise ApiError(400, "input: an empty text has no embedding", param="input")
    vectors: FloatArray = embedder.embed(texts).vectors
    return vectors, sum(map(len, ids))


def _encoded(vector: FloatArray, kind: str | None) -> list[float] | str:
    if kind == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()
    return [float(value) for value in vector]
