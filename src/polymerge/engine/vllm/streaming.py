"""The vLLM engine for a server: requests come at any time, their answers come piece by piece.

One thread an answer reads vLLM's stream. Batches and their order are vLLM's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...errors import EngineBusyError, EngineDownError
from ..admission import DEFAULT_LIMITS
from ..answer import Answer
from ..streaming import EngineState, Listener, Stream, StreamRequest
from .api import VllmApi
from .engine import CONCURRENCY, VllmEngine

HEALTH_SECONDS = 1.0


class VllmStreaming(VllmEngine):
    """A `polymerge.engine.streaming.StreamingEngine` on a running vLLM server.

    Args:
        concurrency: answers at the same time; vLLM may take fewer of them into a batch.

    Attributes:
        max_waiting: requests that wait for a place at most; more are refused.
    """

    def __init__(
        self, folder: str | Path, api: VllmApi, *, concurrency: int = CONCURRENCY, guided: bool = False
    ) -> None:
        super().__init__(folder, api, concurrency=concurrency, guided=guided)
        self.max_waiting = DEFAULT_LIMITS.max_waiting
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="polymerge-vllm")
        self._rows = concurrency
        self._answers: set[Answer] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._health = (0.0, True)

    @property
    def state(self) -> EngineState:
        """`restarting` while vLLM does not answer: whoever runs it may start it again."""
        now = time.monotonic()
        if now - self._health[0] > HEALTH_SECONDS:
            self._health = (now, self.api.healthy())
        status: Any = "stopped" if self._closing else "ready" if self._health[1] else "restarting"
        under_way = len(self._answers)
        return EngineState(status, min(under_way, self._rows), max(0, under_way - self._rows))

    def submit(self, requests: Sequence[StreamRequest], listeners: Sequence[Listener]) -> list[Stream]:
        """As in the contract."""
        answers = [self.answer(*pair) for pair in zip(requests, listeners, strict=True)]
        with self._changed:
            if self._closing:
                raise EngineDownError("the engine is stopping")
            if len(self._answers) + len(answers) > self._rows + self.max_waiting:
                raise EngineBusyError(f"{len(self._answers)} requests are under way already; try again later")
            self._answers.update(answers)
        for answer in answers:
            self._pool.submit(self._run, answer)
        return list(answers)

    def close(self, seconds: float | None = None) -> None:
        """As in the contract. The server lives on: it is whoever started it who ends it."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._answers, seconds)
            for answer in self._answers:
                answer.fail(EngineDownError("the engine was stopped before the answer was whole"))
        self._pool.shutdown(wait=seconds is None, cancel_futures=True)

    def _run(self, answer: Answer) -> None:
        try:
            self._reader.read(answer, self._model(answer.request.generate.expert))
        finally:
            with self._changed:
                self._answers.discard(answer)
                self._changed.notify_all()
