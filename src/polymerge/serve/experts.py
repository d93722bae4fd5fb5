"""GET, POST /v1/experts and DELETE /v1/experts/{name}: which of a bundle's experts are in memory, while it is served.

A model with the experts that are wanted is made beside the one that answers, of which it takes the average's weights;
then that one hands its answers over.
Knows bundles and who may ask; how answers are handed over is the engine's (`BatchingEngine.replace`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from ..bundle.bundle import Bundle
from ..engine.local.batching import BatchingEngine
from ..engine.local.engine import HFEngine
from ..errors import BundleError
from .errors import ApiError
from .keys import KeyRing
from .lanes import Lane

logger = logging.getLogger("polymerge.serve")


class ExpertRequest(BaseModel):
    """POST /v1/experts"""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class LoadedExperts:
    """A bundle's experts, some of them in memory.

    Args:
        bundle: as it was opened when the server started; one that has more experts by now is opened again.
        load: makes a checked engine of a bundle's chosen experts, beside the model that answers.
        seconds: for the answers of an expert that is unloaded.
    """

    def __init__(
        self, bundle: Bundle, engine: BatchingEngine, load: Callable[[Bundle, Any], HFEngine], seconds: float
    ) -> None:
        self._bundle, self._engine, self._load, self._seconds = bundle, engine, load, seconds
        self._weights, self._turn = bundle.base_hashes(), threading.Lock()

    def to_json(self) -> dict[str, Any]:
        """All experts of the bundle, and whether they are loaded."""
        sizes, loaded = self._bundle.sizes().experts, self._engine.experts
        data = [
            {"id": name, "object": "expert", "loaded": name in loaded, "bytes": sizes[name]}
            for name in self._bundle.manifest.experts
        ]
        return {"object": "list", "data": data}

    def load(self, name: str) -> None:
        """Loads one more. One that `polymerge add` has brought meanwhile is there too.

        Raises:
            ApiError: there is none of that name, it is loaded, or the bundle is no longer the same.
        """
        with self._turn:
            bundle = self._same(Bundle.open(self._bundle.path))
            if name not in bundle.manifest.experts:
                known = ", ".join(bundle.manifest.experts)
                raise ApiError(404, f"the bundle has no expert {name!r}; it has {known}", param="name")
            if name in self._engine.experts:
                raise ApiError(409, f"expert {name!r} is loaded already", param="name")
            self._serve(bundle, [*self._engine.experts, name])

    def unload(self, name: str) -> None:
        """Ends its answers, then gives its memory back.

        Raises:
            ApiError: it is not loaded, or is the last one.
        """
        with self._turn:
            if name not in self._engine.experts:
                raise ApiError(404, f"expert {name!r} is not loaded", param="name", code="model_not_found")
            left = [other for other in self._engine.experts if other != name]
            if not left:
                raise ApiError(409, f"expert {name!r} is the last one; a bundle is served with at least one")
            self._serve(self._bundle, left)

    def _serve(self, bundle: Bundle, names: Sequence[str]) -> None:
        some = set(names) != set(bundle.manifest.experts)
        if some and bundle.shared:
            raise ApiError(409, "this bundle's experts share factors: all are loaded, or none; see `method: published`")
        try:
            chosen = bundle.only(names) if some else bundle
            self._engine.replace(self._load(chosen, self._engine.model), self._seconds)
        except BundleError as error:
            logger.error("experts cannot be changed: %s", error)
            raise ApiError(409, "the bundle's experts cannot be changed now; the server's log says why") from None
        self._bundle = bundle
        logger.info("serving %s", ", ".join(names))

    def _same(self, bundle: Bundle) -> Bundle:
        if bundle.base_hashes() != self._weights:
            raise ApiError(409, "the bundle's average is another one by now; start the server again")
        return bundle


def expert_routes(experts: LoadedExperts, keys: KeyRing) -> APIRouter:
    """All three, for an admin's key."""
    routes = APIRouter()
    lane: Lane[Callable[[], None], None] = Lane("experts", lambda calls: [call() for call in calls], 1)

    @routes.get("/v1/experts")
    async def listed(request: Request) -> dict[str, Any]:
        """Which there are, and which are loaded."""
        keys.check_admin(request.state.key)
        return experts.to_json()

    @routes.post("/v1/experts")
    async def load(body: ExpertRequest, request: Request) -> dict[str, Any]:
        """Loads one. It answers when that is done."""
        keys.check_admin(request.state.key)
        await lane.ask([lambda: experts.load(body.name)])
        return experts.to_json()

    @routes.delete("/v1/experts/{name}")
    async def unload(name: str, request: Request) -> dict[str, Any]:
        """Unloads one, when its answers have ended."""
        keys.check_admin(request.state.key)
        await lane.ask([lambda: experts.unload(name)])
        return experts.to_json()

    return routes
