"""How the command line shows that work goes on: a moving line, a bar, plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.spinner import Spinner
from rich.text import Text

from .console import duration, err, size

if TYPE_CHECKING:
    from ..merging.run import OnProgress
    from ..merging.run import Progress as MergeProgress

PLAIN_STEP = 0.1  # without a terminal, a line of progress for every tenth of the work


@contextmanager
def waiting(what: str, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """In a terminal a moving line that says what takes its time, until the work ends, what is given is called, or the
    hub's library draws a bar of its own. What the work prints goes where it would go without."""
    if quiet or not err.is_terminal:
        yield lambda: None
        return
    from ..sources.hub import before_downloads

    spinner = Spinner("dots", Text(what), style="status.spinner")
    line = Live(
        spinner, console=err, transient=True, refresh_per_second=12.5, redirect_stdout=False, redirect_stderr=False
    )
    with line as moving, before_downloads(moving.stop):
        yield moving.stop


@contextmanager
def merge_progress(quiet: bool, work: str = "merging", *, bytes: bool = True) -> Iterator[OnProgress | None]:
    """A progress line with rate (where bytes are counted), time left and peak memory; plain lines where there is no
    terminal."""
    if quiet:
        yield None
    elif not err.is_terminal:
        yield _PlainProgress(work, bytes)
    else:
        columns = (TextColumn(work), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
        bar = Progress(*columns, console=err, transient=True)
        task = bar.add_task("merge", total=None, note="")

        def show(step: MergeProgress) -> None:
            bar.start()  # now, not before: what comes first has a progress of its own
            bar.update(task, total=step.total, completed=step.done, note=_note(step, bytes))
            if step.done == step.total:
                bar.stop()

        try:
            yield show
        finally:
            bar.stop()


class _PlainProgress:
    def __init__(self, work: str, bytes: bool) -> None:
        self._work, self._bytes, self._next = work, bytes, 0.0

    def __call__(self, step: MergeProgress) -> None:
        share = step.done / step.total
        if share >= self._next or step.done == step.total:
            self._next = share + PLAIN_STEP
            err.print(f"{self._work}: {share:4.0%}  {_note(step, self._bytes)}", soft_wrap=True)


def _note(step: MergeProgress, bytes: bool) -> str:
    rate = (step.done - step.resumed) / step.seconds if step.seconds else 0.0
    how_fast = f"{size(rate)}/s, " if bytes else ""
    return f"{how_fast}{duration(step.seconds_left)} left, peak memory {size(step.peak_memory)}"


@contextmanager
def progress_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told (done, total); it makes room for those of the hub's library."""
    from ..sources.hub import before_downloads

    with Progress(console=err, transient=True, disable=quiet) as bar, before_downloads(bar.live.stop):
        task = bar.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            bar.start()  # again, after a download
            bar.update(task, completed=done, total=total)

        yield show
