"""GET /health, /ready and /metrics: what whoever runs the server asks it."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from .errors import RETRY_SECONDS
from .service import Service


def status_routes(service: Service) -> APIRouter:
    """All three."""
    routes = APIRouter()

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

    return routes
