"""Work for the thread that owns the model, other than answers: jobs of one kind that wait together run as one call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Job:
    key: Hashable
    items: list[Any]
    run: Callable[[Sequence[Any]], list[Any]]
    future: Future[list[Any]]


class Jobs:
    """A queue of calls that take a list and give a list of the same length."""

    def __init__(self) -> None:
        self._jobs: list[_Job] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, key: Hashable, items: Sequence[Any], run: Callable[[Sequence[Any]], list[Any]]) -> Future[list[Any]]:
        """Jobs with one key can be run by any one's `run`."""
        job = _Job(key, list(items), run, Future())
        with self._lock:
            self._jobs.append(job)
        return job.future

    def run(self) -> None:
        """Runs what is there. An error of a call goes to those who wait for it, and to no one else."""
        groups: dict[Hashable, list[_Job]] = {}
        for job in self._taken():
            groups.setdefault(job.key, []).append(job)
        for jobs in groups.values():
            _run_together(jobs)

    def fail(self, error: Exception) -> None:
        """Tells everyone who waits."""
        for job in self._taken():
            job.future.set_exception(error)

    def _taken(self) -> list[_Job]:
        with self._lock:
            taken, self._jobs = self._jobs, []
        return taken


def _run_together(jobs: Sequence[_Job]) -> None:
    try:
        results = jobs[0].run([item for job in jobs for item in job.items])
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
        else:
            for job in jobs:
                _run_together([job])
        return
    for job in jobs:
        of_job, results = results[: len(job.items)], results[len(job.items) :]
        job.future.set_result(of_job)
