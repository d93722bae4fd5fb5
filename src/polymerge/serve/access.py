"""Who may ask, how often and how much: keys, rates, hosts, body sizes. Stands before every route but /health.

A full server refuses here, before it reads what is asked: a refusal must cost next to nothing where many come. Plain
ASGI: knows headers, paths and bytes, not requests' meaning.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, MutableMapping
from contextlib import ExitStack
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import EngineBusyError
from .errors import RETRY_SECONDS, ApiError, told
from .gate import Gate
from .keys import KeyRing
from .metrics import Metrics
from .settings import ServeSettings

logger = logging.getLogger("polymerge.serve")

OPEN = "/health"


class Buckets:
    """A token bucket for every key: `per_minute` requests at once, then as they flow back."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._size, self._clock = per_minute / 60, float(per_minute), clock
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> float:
        """Takes one request. Returns 0, or the seconds until there is one."""
        now = self._clock()
        level, then = self._levels.get(name, (self._size, now))
        level = min(self._size, level + (now - then) * self._rate)
        allowed = level >= 1
        self._levels[name] = (level - allowed, now)
        return 0.0 if allowed else (1 - level) / self._rate


class Access:
    """The middleware. What it refuses, it answers itself.

    Args:
        gated: paths whose POST takes a place of the gate.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        metrics: Metrics,
        keys: KeyRing,
        gate: Gate,
        gated: Collection[str],
    ) -> None:
        self._app, self._settings, self._metrics, self._keys = app, settings, metrics, keys
        self._gate, self._gated = gate, gated
        self._buckets = Buckets(settings.requests_per_minute) if settings.requests_per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        request = uuid.uuid4().hex
        ends = ExitStack()  # what a request has taken is given back with its end, whatever that is
        scope.setdefault("state", {}).update(began=began, key=None, ends=ends)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", []))
                message["headers"] = [*headers, (b"x-request-id", request.encode())]
            await send(message)

        try:
            if scope["path"] != OPEN:
                self._admit(scope)
                receive = await self._read(scope, receive)
            await self._app(scope, receive, noted)
        except (ApiError, EngineBusyError) as error:
            await _answer(told(error), noted)
        except asyncio.CancelledError:  # only the server's end cancels a request
            logger.warning("request %s was cut off by the server's end", request)
            if not status:
                await _answer(ApiError(503, "the server is ending", retry_after=RETRY_SECONDS), noted)
        except Exception as error:
            logger.exception("request %s failed", request)
            if status:
                raise
            await _answer(told(error), noted)
        finally:
            ends.close()
            self._note(scope, status, time.monotonic() - began, request)

    def _note(self, scope: Scope, status: int, seconds: float, request: str) -> None:
        route = scope.get("route")
        refused = scope["path"] if scope["path"] in self._gated else "other"  # before there was a route
        endpoint = getattr(route, "path", refused)
        # a client that has gone before the answer began: nginx's number for it
        self._metrics.requests.labels(endpoint, status or 499).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        state = scope["state"]
        logger.info(
            "%s %s %d %.3f s key=%s expert=%s request=%s",
            scope["method"], endpoint, status or 499, seconds, state.get("key"), state.get("expert"), request,
        )  # fmt: skip

    def _admit(self, scope: Scope) -> None:
        headers = _headers(scope)
        host = re.sub(r":\d*$", "", headers.get("host", ""))  # an IPv6 address stands in brackets
        if self._settings.hosts and host.lower() not in self._settings.hosts:
            raise ApiError(421, "this server is not asked by that name; start it with --allow-host to allow it")
        name = self._keys.name(headers.get("authorization", ""))
        scope["state"]["key"] = name
        wait = self._buckets.take(name or "") if self._buckets else 0.0
        if wait:
            raise ApiError(429, "too many requests with this key", code="rate_limit", retry_after=int(wait) + 1)
        if scope["method"] == "POST" and scope["path"] in self._gated:
            self._gate.check()

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """Takes the whole body, as far as it is allowed; what follows (the client's going) is heard as before."""
        if scope["method"] != "POST":  # no route reads the body of another
            return receive
        kind = _headers(scope).get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # the others are what a web page may send anywhere without being asked
            raise ApiError(415, "the body must be application/json")
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self._settings.body_seconds)
        except TimeoutError:
            raise ApiError(408, "the body did not come in time") from None
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        error = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        said = _headers(scope).get("content-length", "")
        if said.isdigit() and int(said) > limit:
            raise error
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client has gone")
            body += message.get("body", b"")
            if len(body) > limit:
                raise error
            if not message.get("more_body"):
                return bytes(body)


def _headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def _answer(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
