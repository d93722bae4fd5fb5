"""Connections that bring no request: how long they may stay, and how many there may be.

uvicorn waits for ever for the second half of a header, and accepts until the process has no file left. Knows sockets
and clocks; does not know requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .settings import ServeSettings

logger = logging.getLogger("polymerge.serve")

# Connections that are accepted in one go, before any of them is looked at.
BACKLOG = 64
# Files that the process needs beside its connections.
OTHER_FILES = 64
# What is refused is told once in so many seconds.
TOLD_EVERY = 60.0

_Http: Any = AutoHTTPProtocol


class Refusals:
    """Counts what is refused, and tells it in one line a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._counts, self._told = clock, Counter[str](), -TOLD_EVERY

    def add(self, reason: str) -> None:
        """One more."""
        self._counts[reason] += 1
        if self._clock() - self._told >= TOLD_EVERY:
            self._told = self._clock()
            told = ", ".join(f"{count} {reason}" for reason, count in self._counts.items())
            logger.warning("connections closed: %s", told)
            self._counts.clear()


def http_protocol(settings: ServeSettings) -> type[asyncio.Protocol]:
    """uvicorn's protocol with a deadline for headers and a cap on connections."""
    refusals, most = Refusals(), connections_that_fit(settings.max_connections)
    quiet = logging.getLogger("polymerge.serve.http")
    quiet.setLevel(logging.ERROR)  # a warning for every line that is no HTTP would fill the disk

    class Bounded(_Http):  # type: ignore[misc]
        _timer: asyncio.TimerHandle | None = None
        since = 0.0

        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.logger = quiet

        @property
        def asked(self) -> bool:
            """Whether a request is being answered."""
            return self.cycle is not None and not self.cycle.response_complete

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()
            there = [one for one in self.connections if not one.transport.is_closing()]
            if len(there) > most:
                refusals.add(f"since there are more than {most}")
                min((one for one in there if not one.asked), key=lambda one: one.since).transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.asked:
                self._stop_waiting()
            elif self._timer is None and not self.transport.is_closing():
                self._wait()  # half a header on a connection that is kept alive

        def on_response_complete(self) -> None:
            self.since = self.loop.time()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            refusals.add("that sent no HTTP")
            super().send_400_response(msg)

        def _wait(self) -> None:
            self.since = self.loop.time()
            self._timer = self.loop.call_later(settings.header_seconds, self._late)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if not self.asked:
                refusals.add(f"without a whole header in {settings.header_seconds:g} s")
                self.transport.abort()

    return Bounded


def connections_that_fit(most: int) -> int:
    """As many, or what the process's limit of open files leaves."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return most
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if files == resource.RLIM_INFINITY else max(1, min(most, files - OTHER_FILES - 2 * BACKLOG))
