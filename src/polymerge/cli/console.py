"""How the command line writes: bytes and times in words, and a merge's progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

if TYPE_CHECKING:
    from ..merger import OnProgress
    from ..merger import Progress as MergeProgress

# Results go to standard output; progress and errors to standard error, so that output can be piped.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

PLAIN_STEP = 0.1  # without a terminal, a line of progress for every tenth of the work


def size(count: float) -> str:
    """Bytes for people: 538.1 MB (decimal, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """Seconds for people: 3 min 20 s."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def print_json(data: Any) -> None:
    """One JSON object, for machines."""
    json.dump(data, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")


@contextmanager
def merge_progress(quiet: bool) -> Iterator[OnProgress | None]:
    """A progress line with rate, time left and peak memory; plain lines where there is no terminal."""
    if quiet:
        yield None
    elif not err.is_terminal:
        yield _PlainProgress()
    else:
        columns = (TextColumn("merging"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task("merge", total=None, note="")

            def show(step: MergeProgress) -> None:
                bar.update(task, total=step.total, completed=step.done, note=_note(step))

            yield show


class _PlainProgress:
    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, step: MergeProgress) -> None:
        share = step.done / step.total
        if share >= self._next or step.done == step.total:
            self._next = share + PLAIN_STEP
            err.print(f"merging: {share:4.0%}  {_note(step)}", soft_wrap=True)


def _note(step: MergeProgress) -> str:
    rate = (step.done - step.resumed) / step.seconds if step.seconds else 0.0
    return f"{size(rate)}/s, {duration(step.seconds_left)} left, peak memory {size(step.peak_memory)}"
