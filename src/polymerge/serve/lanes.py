"""Blocking work on a model for many requests: one thread a kind of work, a slice of everybody's items at a time.

A request that waits holds no thread, and one that is cancelled is dropped before its next slice. Knows threads and the
event loop; does not know what the work is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ..engine.jobs import Jobs

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lane(Generic[Item, Result]):
    """One kind of work. Its thread lives while there is some.

    Args:
        work: items to as many results.
        most: items of one slice.
    """

    def __init__(self, name: str, work: Callable[[Sequence[Item]], Sequence[Result]], most: int) -> None:
        self._name, self._work, self._most = name, work, most
        self._jobs, self._lock, self._busy = Jobs(), threading.Lock(), False

    @property
    def waiting(self) -> int:
        """Requests of which nothing is being done now."""
        return self._jobs.waiting

    async def ask(self, items: Sequence[Item]) -> list[Result]:
        """Their results. Cancelling it drops what is not done. Raises what the work does."""
        future = self._jobs.put(self._name, items, self._work)
        with self._lock:
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._run, name=f"polymerge-{self._name}", daemon=True).start()
        return await asyncio.wrap_future(future)

    def _run(self) -> None:
        while True:
            self._jobs.run(self._most)
            with self._lock:
                if not len(self._jobs):
                    self._busy = False
                    return
