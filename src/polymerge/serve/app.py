"""`create_app(engine, router)`: the server as an ASGI application. Nothing happens when this module is imported."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..engine.streaming import StreamingEngine
from ..errors import PolymergeError
from ..router.route import Routes
from ..version import __version__
from .access import Access
from .completions import completion_routes
from .errors import NO_JSON, ApiError, invalid, told
from .experts import LoadedExperts, expert_routes
from .feedback import feedback_routes
from .judgements import judgement_routes
from .keys import KeyRing
from .kit import kit_routes
from .models import model_routes
from .playground import playground_routes
from .responding import response_routes
from .service import Service
from .settings import ServeSettings
from .stages import Responds
from .status import status_routes


def create_app(
    engine: StreamingEngine,
    router: Routes | None = None,
    pipeline: Responds | None = None,
    settings: ServeSettings | None = None,
    experts: LoadedExperts | None = None,
) -> FastAPI:
    """The application.

    Args:
        engine: stays the caller's, who closes it when the server has ended.
        router: without one there is no model `auto`.
        experts: what loads and unloads experts; without it that cannot be done over HTTP.
        pipeline: a `polymerge.staged.Pipeline`; without one there is no model `staged`.

    Returns:
        An application whose `state.service` is the `Service` behind it, and `state.keys` its `KeyRing`.
    """
    settings = settings or ServeSettings()
    service = Service(engine, router, pipeline, settings)
    app = FastAPI(
        title="polymerge",
        version=__version__,
        description="A bundle's experts behind the OpenAI API.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.keys = keys = KeyRing(settings.keys, settings.key_file)
    admitted = (
        completion_routes(service),
        response_routes(service),
        judgement_routes(service, router),
        kit_routes(service),
    )
    for routes in (
        *admitted,
        model_routes(service),
        feedback_routes(service),
        status_routes(service),
        *([expert_routes(experts, keys)] if experts else []),
        playground_routes(),
    ):
        app.include_router(routes)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    for known in (ApiError, PolymergeError):
        app.add_exception_handler(known, _on_error)
    gated = frozenset(route.path for routes in admitted for route in routes.routes if isinstance(route, APIRoute))
    app.add_middleware(Access, settings=settings, metrics=service.metrics, keys=keys, gate=service.gate, gated=gated)
    if settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # clients send headers of their own, such as OpenAI's x-stainless-*
            expose_headers=["x-polymerge-expert", "x-polymerge-field", "x-polymerge-confidence", "x-request-id"],
        )
    return app


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    known = told(error)
    if known.status == 500:
        raise error  # logged and answered by `Access`, as whatever else nobody expected
    return JSONResponse(known.body, status_code=known.status, headers=known.headers)


async def _on_invalid(request: Request, error: Any) -> JSONResponse:
    return await _on_error(request, invalid(error.errors()))


async def _on_http(request: Request, error: Any) -> JSONResponse:
    """No such route, a method that it has not, or a body that is not JSON."""
    messages = {
        400: NO_JSON,
        404: f"no route {request.url.path}",
        405: f"{request.method} is not a method of this route",
    }
    known = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    return JSONResponse(known.body, status_code=known.status, headers=dict(error.headers or {}))
