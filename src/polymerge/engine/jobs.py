"""Work that waits for a thread: lists of items, done a slice at a time, so that no long list holds up a short one.

Knows items, their sizes and who still waits. Does not know what the work is, or the thread that does it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .ticket import Ticket, asking, current_ticket, not_wanted

Work = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(eq=False)
class _Job:
    """A list on its way: `done` are the results of its first items."""

    key: Hashable
    items: Sequence[Any]
    sizes: Sequence[int]
    work: Work
    ticket: Ticket
    future: Future[list[Any]] = field(default_factory=Future)
    done: list[Any] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.future.done() or self.ticket.over

    def end(self, error: Exception | None = None) -> None:
        with suppress(InvalidStateError):  # whoever waited has left
            if error is None:
                self.future.set_result(self.done)
            else:
                self.future.set_exception(error)


class Jobs:
    """A queue of lists that is worked off in turns: a slice of the first list, filled up from those behind it that
    want the same; then the lists that have something left stand behind the others."""

    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._doing: list[_Job] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._jobs) + len(self._doing)

    @property
    def waiting(self) -> int:
        """Jobs of which nothing is being done now."""
        return len(self._jobs)

    def put(
        self, key: Hashable, items: Sequence[Any], work: Work, sizes: Sequence[int] | None = None
    ) -> Future[list[Any]]:
        """A result an item, in their order. Cancelling the future drops what is not done; so does the end of the
        ticket that the calling thread has.

        Args:
            work: takes a part of the items. Jobs with one key can be done by any one's.
            sizes: of the items, as `run` counts them; each is 1 by default.
        """
        job = _Job(key, items, sizes or [1] * len(items), work, current_ticket())
        if not len(items):
            job.end()
            return job.future
        with self._lock:
            self._jobs.append(job)
        return job.future

    def run(self, budget: int) -> None:
        """Does one slice: items of one key whose number times the largest size is within the budget, or one item. An
        error goes to the jobs whose items caused it, and to no one else."""
        slices = self._next(budget)
        if not slices:
            return
        _work([(job, job.items[len(job.done) : len(job.done) + count]) for job, count in slices])
        with self._lock:
            self._jobs.extend(job for job in self._doing if not job.future.done())
            self._doing = []

    def fail(self, error: Exception) -> None:
        """Tells everyone who waits, also those whose slice is being done."""
        with self._lock:
            jobs = [*self._jobs, *self._doing]
            self._jobs.clear()
        for job in jobs:
            job.end(error)

    def _next(self, budget: int) -> list[tuple[_Job, int]]:
        """The jobs of the next slice, taken out of the queue, with how many of their items it has."""
        with self._lock:
            for job in [job for job in self._jobs if job.over]:
                self._jobs.remove(job)
                job.end(not_wanted())
            slices: list[tuple[_Job, int]] = []
            total = largest = 0
            for job in [job for job in self._jobs if job.key == self._jobs[0].key]:
                count = 0
                for size in job.sizes[len(job.done) :]:
                    if total and (total + 1) * max(largest, size) > budget:
                        break
                    count, total, largest = count + 1, total + 1, max(largest, size)
                if not count:
                    break
                slices.append((job, count))
            for job, _ in slices:
                self._jobs.remove(job)
            self._doing = [job for job, _ in slices]
            return slices


def _work(slices: Sequence[tuple[_Job, Sequence[Any]]]) -> None:
    """Calls the work once for all; where that fails, once for each."""
    jobs = [job for job, _ in slices]
    wanted = Ticket(lambda: not all(job.over for job in jobs))
    try:
        with asking(wanted):
            results = list(jobs[0].work([item for _, items in slices for item in items]))
    except Exception as error:
        if len(slices) == 1:
            jobs[0].end(error)
        else:
            for one in slices:
                _work([one])
        return
    for job, items in slices:
        job.done += results[: len(items)]
        results = results[len(items) :]
        if len(job.done) == len(job.items):
            job.end()
