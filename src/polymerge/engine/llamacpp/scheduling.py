"""Runs work on a llama.cpp server by turns: one thread decides (`turns.decide`), others wait for the server.

Knows work with an expert's name, and how many may run at once. Does not know requests or the server.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from .turns import TURN_SECONDS, Turn, decide

logger = logging.getLogger(__name__)

# How often a turn's age is looked at while nothing else happens.
LOOK_SECONDS = 0.1


@dataclass(eq=False)
class Work:
    """Something to be done for one expert.

    Attributes:
        name: the expert's, or the average's.
        tokens: of the caches, at most.
        run: does it, and returns whether it is done; where not, it was set aside and is called again.
        arrived: when it began to wait.
        aside: set when it shall make room, if it can.
    """

    name: str
    tokens: int
    run: Callable[[Work], bool]
    arrived: float = field(default_factory=time.monotonic)
    aside: threading.Event = field(default_factory=threading.Event)


class Scheduler:
    """Gives work its turn.

    Args:
        rows: pieces of work at the same time.
        cache_tokens: of all of them; one always fits.
    """

    def __init__(self, rows: int, cache_tokens: int, *, seconds: float = TURN_SECONDS) -> None:
        self.rows, self.cache_tokens, self._seconds = rows, cache_tokens, seconds
        self._pool = ThreadPoolExecutor(rows, thread_name_prefix="polymerge-llama")
        self._changed = threading.Condition()
        self._waiting: list[Work] = []
        self._running: set[Work] = set()
        self._turn: Turn | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="polymerge-llama-turns", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> tuple[int, int]:
        """How many run and how many wait."""
        return len(self._running), len(self._waiting)

    def add(self, work: list[Work]) -> None:
        """Takes work; it runs when it is its turn."""
        with self._changed:
            self._waiting += work
            self._changed.notify_all()

    def drain(self, seconds: float | None) -> None:
        """Waits until all is done, for so long at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._running, seconds)

    def close(self) -> None:
        """Begins nothing more, and waits for what runs."""
        with self._changed:
            self._closing = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def _loop(self) -> None:
        with self._changed:
            while not self._closing:
                self._step(time.monotonic())
                self._changed.wait(LOOK_SECONDS if self._waiting and self._running else None)

    def _step(self, now: float) -> None:
        waiting: dict[str, float] = {}
        for work in self._waiting:
            waiting[work.name] = min(work.arrived, waiting.get(work.name, work.arrived))
        decision = decide(self._turn, len(self._running), waiting, now, seconds=self._seconds)
        self._turn = decision.turn
        if decision.set_aside:
            for work in self._running:
                work.aside.set()
        if decision.admit and decision.turn is not None:
            for work in self._admitted(decision.turn.name):
                self._waiting.remove(work)
                self._running.add(work)
                self._pool.submit(self._do, work)

    def _admitted(self, name: str) -> list[Work]:
        """Those that join, the oldest first. Nobody overtakes one of the same expert."""
        used, rows, joined = sum(work.tokens for work in self._running), len(self._running), list[Work]()
        for work in sorted((w for w in self._waiting if w.name == name), key=lambda w: w.arrived):
            if rows >= self.rows or (rows and used + work.tokens > self.cache_tokens):
                break
            used, rows = used + work.tokens, rows + 1
            joined.append(work)
        return joined

    def _do(self, work: Work) -> None:
        done = True
        try:
            done = work.run(work)
        except Exception:  # work tells its own failures; what is left is a mistake here
            logger.exception("work for llama.cpp failed")
        with self._changed:
            self._running.discard(work)
            if not done:
                work.aside.clear()
                work.arrived = time.monotonic()
                self._waiting.append(work)
            self._changed.notify_all()
