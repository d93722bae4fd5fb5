"""How `polymerge demo` tells of a demo: its steps, and what was kept."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.table import Table

from .console import duration, err, out, over, size
from .progress import merge_progress

if TYPE_CHECKING:
    from ..demo.run import DemoResult, Listeners
    from ..demo.train import TrainProgress

# What to ask an expert of the demo's own.
ASK = {
    "json": "An order for Olga: 12 stamps.",
    "math": "Anna has 7 pens and gets 5 more.",
    "shell": "Find all pdf files in docs.",
}


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
    if err.is_terminal or step.step % 10 == 0 or step.step == step.steps:
        over(line, last=step.step == step.steps)


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
    line = f'try: {_command()} generate {shlex.quote(str(result.bundle))} --expert {first} "{ASK.get(first, "...")}"'
    out.print(line, markup=False, soft_wrap=True)


def _command() -> str:
    """How to call this command here: `make demo` installs it where a shell does not look."""
    return "polymerge" if shutil.which("polymerge") else sys.argv[0]
