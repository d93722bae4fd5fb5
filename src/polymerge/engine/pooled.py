"""Any engine behind a server: every request is a call of its own in a thread, and its answer comes in one piece.

For engines that batch by themselves, as vLLM does. Knows threads and the queue; does not know how the engine works.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ..errors import DeadlineError, EngineBusyError, EngineDownError, ModelError
from .base import Engine, FloatArray, GenerateRequest, Generation, Message, Pooling, Prompt, Score, ScoreRequest
from .streaming import EngineState, Listener, Piece, Stream, StreamRequest

if TYPE_CHECKING:
    from typing import Literal

MAX_RUNNING = 64
MAX_WAITING = 256


class PooledEngine:
    """A `polymerge.engine.StreamingEngine` made of an `Engine` that may be called from many threads at once.

    Args:
        max_running: calls at the same time.
        max_waiting: requests that wait for one at most; more are refused.
    """

    def __init__(self, engine: Engine, *, max_running: int = MAX_RUNNING, max_waiting: int = MAX_WAITING) -> None:
        self._engine, self._most, self._max_running = engine, max_running + max_waiting, max_running
        self._pool = ThreadPoolExecutor(max_running, thread_name_prefix="polymerge-engine")
        self._taken, self._lock = 0, threading.Lock()
        self._status: Literal["ready", "stopped"] = "ready"

    @property
    def experts(self) -> list[str]:
        return self._engine.experts

    @property
    def max_length(self) -> int:
        return self._engine.max_length

    @property
    def fingerprint(self) -> str:
        return self._engine.fingerprint

    @property
    def state(self) -> EngineState:
        running = min(self._taken, self._max_running)
        return EngineState(self._status, running, self._taken - running)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """As in the contract."""
        return self._engine.encode(text, special=special)

    def decode(self, ids: Sequence[int]) -> str:
        """As in the contract."""
        return self._engine.decode(ids)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """As in the contract."""
        return self._engine.chat_prompt(messages)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As in the contract."""
        return self._engine.generate(requests)

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """As in the contract."""
        return self._engine.loglikelihood(requests)

    def embed(
        self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last"
    ) -> FloatArray:
        """As in the contract."""
        return self._engine.embed(prompts, layers=layers, pooling=pooling)

    def submit(self, requests: Sequence[StreamRequest], listeners: Sequence[Listener]) -> list[Stream]:
        """As in the contract. Raises ModelError too where scores are asked for."""
        if any(request.logprobs is not None or request.score_prompt for request in requests):
            raise ModelError("logprobs: this engine does not tell log-probabilities")
        calls = [
            _Call(request, listener, self._length(request))
            for request, listener in zip(requests, listeners, strict=True)
        ]
        with self._lock:
            if self._status != "ready":
                raise EngineDownError("the engine has stopped")
            if self._taken + len(calls) > self._most:
                raise EngineBusyError(f"{self._taken} requests are running or waiting already; try again later")
            self._taken += len(calls)
        for call in calls:
            self._pool.submit(self._run, call)
        return list(calls)

    def close(self, seconds: float | None = None) -> None:
        """As in the contract; what has begun is always finished, which the engine behind it bounds."""
        with self._lock:
            self._status = "stopped"
        self._pool.shutdown(wait=True, cancel_futures=seconds == 0)

    def _length(self, request: StreamRequest) -> int:
        prompt = request.generate.prompt
        return len(self._engine.encode(prompt) if isinstance(prompt, str) else prompt)

    def _run(self, call: _Call) -> None:
        try:
            if not call.cancelled:
                call.answer(self._engine)
        finally:
            with self._lock:
                self._taken -= 1


class _Call:
    """A `polymerge.engine.streaming.Stream`."""

    def __init__(self, request: StreamRequest, listener: Listener, prompt_tokens: int) -> None:
        self._request, self._listener, self.prompt_tokens = request, listener, prompt_tokens
        self._late = threading.Timer(request.seconds, self._too_late) if request.seconds is not None else None
        self._lock = threading.Lock()
        self.cancelled = False
        if self._late:
            self._late.daemon = True
            self._late.start()

    def cancel(self) -> None:
        """The engine's own work goes on, but nobody hears of it."""
        with self._lock:
            self.cancelled = True
        if self._late:
            self._late.cancel()

    def answer(self, engine: Engine) -> None:
        try:
            found = engine.generate([self._request.generate])[0]
            self._tell(Piece(found.text, found.tokens, found.finish))
        except Exception as error:
            self._tell(error)

    def _too_late(self) -> None:
        self._tell(DeadlineError(f"the answer was not whole within {self._request.seconds:g} s"))

    def _tell(self, heard: Piece | Exception) -> None:
        with self._lock:
            told, self.cancelled = self.cancelled, True
        if not told:
            self._listener(heard)
        if self._late:
            self._late.cancel()
