"""How `polymerge eval` tells of a comparison: its progress and its table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from .console import duration, out, over

if TYPE_CHECKING:
    from ..engine.wrappers.cached import OnRequests
    from ..evaluate import Comparison


@contextmanager
def request_progress(quiet: bool, what: str = "asked") -> Iterator[OnRequests | None]:
    """A line of requests done and time left, for every pass over them."""
    began = [0.0, 0.0]  # seconds and requests when this pass began

    def show(done: int, total: int) -> None:
        if done == total and not began[1]:
            return  # a pass of one step
        now = time.monotonic()
        if not began[1] or done < began[1]:
            began[:] = [now, done]
        left = (now - began[0]) * (total - done) / (done - began[1]) if done > began[1] else None
        over(f"{what}: {done} of {total}, {duration(left)} left", last=done == total)

    yield None if quiet else show


def print_evaluation(comparison: Comparison) -> None:
    """Accuracy by task and mode, and what answered where the mode chose."""
    table = Table("accuracy", *map(escape, comparison.results))
    for task, row in comparison.accuracies.items():
        table.add_row(escape(task), *("-" if value is None else f"{value:.1%}" for value in row.values()))
    if len(comparison.accuracies) > 1:
        table.add_section()
        table.add_row("mean", *("-" if value is None else f"{value:.1%}" for value in comparison.means.values()))
    out.print(table)
    for mode, results in comparison.results.items():
        for task, counts in results["polymerge"]["answered_by"].items():
            if mode in ("routed", "oracle"):
                shares = ", ".join(f"{expert} {count}" for expert, count in sorted(counts.items()))
                out.print(f"{mode}, {task}: {shares}", markup=False, soft_wrap=True)
