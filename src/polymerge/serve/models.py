"""GET /v1/models: what `model` may be in a request."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from .service import Service


def model_routes(service: Service) -> APIRouter:
    """The list, and one of it."""
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

    return routes


def _model(service: Service, name: str, created: int) -> dict[str, Any]:
    """`max_model_len` is what vLLM calls the context; `max_tokens` is the server's limit for one answer."""
    expert = name if name in service.engine.experts else None
    limits = {"max_model_len": service.engine.max_length_of(expert), "max_tokens": service.settings.max_tokens}
    return {"id": name, "object": "model", "created": created, "owned_by": "polymerge"} | limits
