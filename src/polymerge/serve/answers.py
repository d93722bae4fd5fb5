"""From the engine's thread to the event loop: the pieces of one HTTP request's answers, and their end when it goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from ..engine.streaming import Finish, Listener, Piece, StreamingEngine, StreamRequest, TokenScore
from ..errors import DeadlineError
from .errors import ApiError
from .metrics import Metrics

Result = TypeVar("Result")


@dataclass
class Gathered:
    """One whole answer."""

    text: str = ""
    tokens: int = 0
    finish: Finish = "stop"
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens = piece.tokens
        self.finish = piece.finish or self.finish
        self.scores += piece.scores
        self.prompt_scores += piece.prompt_scores


class Run:
    """Submitted requests of one HTTP request. `async for number, piece in run`, then `close`.

    Raises:
        What `StreamingEngine.submit` does, and from the loop what a listener hears.
    """

    def __init__(
        self, engine: StreamingEngine, requests: Sequence[StreamRequest], metrics: Metrics, *, began: float
    ) -> None:
        self._metrics, self._began, self._closed = metrics, began, False
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self.answers = [Gathered() for _ in requests]
        self._streams = engine.submit(requests, [self._listener(number) for number in range(len(requests))])
        self.prompt_tokens = [stream.prompt_tokens for stream in self._streams]
        self._late = self._call_when_late(requests[0]) if requests else None

    def _call_when_late(self, request: StreamRequest) -> asyncio.TimerHandle | None:
        """An engine in the middle of a long step cannot keep the deadline."""
        if request.seconds is None:
            return None
        left = request.seconds - (time.monotonic() - (request.since or self._began))
        return self._loop.call_later(left, self._heard.put_nowait, (0, late(request.seconds)))

    def _listener(self, number: int) -> Listener:
        def hear(heard: Piece | Exception) -> None:
            self._loop.call_soon_threadsafe(self._heard.put_nowait, (number, heard))

        return hear

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left, first = len(self._streams), True
        while left:
            number, heard = await self._heard.get()
            if isinstance(heard, Exception):
                raise heard
            if first:
                self._metrics.first_token.observe(time.monotonic() - self._began)
                first = False
            self.answers[number].add(heard)
            left -= heard.finish is not None
            yield number, heard

    async def whole(self) -> list[Gathered]:
        """All answers."""
        async for _ in self:
            pass
        return self.answers

    def close(self) -> None:
        """Stops what still runs, and counts the tokens. Again, it does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._late:
            self._late.cancel()
        for stream in self._streams:
            stream.cancel()
        self._metrics.tokens.labels("completion").inc(sum(answer.tokens for answer in self.answers))


def late(seconds: float) -> DeadlineError:
    """What is told of what was not done in time."""
    return DeadlineError(f"the answer was not whole within {seconds:g} s")


async def while_wanted(request: Request, work: Awaitable[Result], *, due: float, seconds: float) -> Result:
    """The work's result; it is cancelled when the client goes or the time is over.

    Args:
        due: of `time.monotonic()`, which is `seconds` after the request came.

    Raises:
        DeadlineError: it was not done in time.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        left = max(0.0, due - time.monotonic())
        await asyncio.wait({task, watch}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watch.done():
            raise ApiError(499, "the client has gone")
        raise late(seconds)
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[object]]) -> None:
    while (await receive())["type"] != "http.disconnect":  # type: ignore[index]
        pass
