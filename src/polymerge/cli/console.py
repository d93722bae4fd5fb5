"""How the command line writes: bytes and times in words, and a merge's progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..demo.run import DemoResult, Listeners
    from ..demo.train import TrainProgress
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
        bar = Progress(*columns, console=err, transient=True)
        task = bar.add_task("merge", total=None, note="")

        def show(step: MergeProgress) -> None:
            bar.start()  # now, not before: what comes first has a progress of its own
            bar.update(task, total=step.total, completed=step.done, note=_note(step))
            if step.done == step.total:
                bar.stop()

        try:
            yield show
        finally:
            bar.stop()


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


def hush_libraries() -> None:
    """transformers draws progress bars of its own for loading and saving; the command line has its own words."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def demo_listeners(quiet: bool) -> Iterator[Listeners]:
    """A demo's progress: its steps as lines, training and merging as bars."""
    from ..demo.run import Listeners

    if quiet:
        yield Listeners(say=lambda text: None)
        return
    began = time.monotonic()

    def say(text: str) -> None:
        err.print(f"[dim]{time.monotonic() - began:4.0f} s[/]  {text}", soft_wrap=True)

    with merge_progress(quiet=False) as merging:
        yield Listeners(say=say, training=_training, merging=merging)


def _training(step: TrainProgress) -> None:
    left = step.seconds / step.step * (step.steps - step.step)
    line = f"        {step.skill}: step {step.step} of {step.steps}, loss {step.loss:.3f}, {duration(left)} left"
    if err.is_terminal:
        err.print(line.ljust(70), end="\n" if step.step == step.steps else "\r")
    elif step.step % 10 == 0 or step.step == step.steps:
        err.print(line, soft_wrap=True)


def print_demo(result: DemoResult) -> None:
    """The demo's table, sizes and where to go on."""
    table = Table(title="exact match on held-out requests (KL to the original expert, nats a token)")
    for column in ("skill", "original expert", "plain average", "bundle, right expert", "kept"):
        table.add_column(column, justify="left" if column == "skill" else "right")
    for row in result.rows:
        table.add_row(
            row.skill,
            f"{row.original:.1%}",
            f"{row.average:.1%} ({row.kl_average:.4f})",
            f"{row.bundle:.1%} ({row.kl_bundle:.4f})",
            f"{row.kept:.1%}",
        )
    out.print(table)
    sizes = result.sizes
    out.print(
        f"size: {size(sizes['total'])} for {len(result.rows)} experts, "
        f"{sizes['share_of_one_model']:.2f} times one model; apart they are {size(sizes['separate_models'])}",
        soft_wrap=True,
    )
    out.print(f"peak memory of this run, training included: {size(result.peak_memory)}")
    out.print(f"report: {result.report}", markup=False, soft_wrap=True)
    first = result.rows[0].skill
    prompt = "An order for Olga: 12 stamps."
    out.print(f'try: polymerge generate {result.bundle} --expert {first} "{prompt}"', markup=False, soft_wrap=True)


def print_sweep(points: Sequence[Mapping[str, Any]], page: Path) -> None:
    """A sweep's points, those on the front in bold."""
    table = Table(title="KL to the original experts on held-out prompts (nats a token)")
    for column in ("code", "rate", "bundle", "of one model", "residuals", "KL", "top-1", "merge"):
        table.add_column(column, justify="left" if column == "code" else "right")
    for point in points:
        table.add_row(
            point["code"],
            f"{point['compress_rate']:g}",
            size(point["total_bytes"]),
            f"{point['share_of_one_model']:.2f}",
            size(point["residual_bytes"]),
            f"{point['kl']:.2g}",
            f"{point['top1']:.2%}",
            duration(point["seconds"]),
            style="bold" if point["on_front"] else None,
        )
    out.print(table)
    out.print("bold: no other point is smaller and nearer")
    out.print(f"report: {page}", markup=False, soft_wrap=True)
