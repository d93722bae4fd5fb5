"""How the command line writes: bytes and times in words, and a merge's progress."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..assess import Assessment, AssessProgress
    from ..assess.run import OnAssess
    from ..demo.run import DemoResult, Listeners
    from ..demo.train import TrainProgress
    from ..engine.wrappers.cached import OnRequests
    from ..evaluate import Comparison
    from ..export import PeftExport
    from ..merging.run import OnProgress
    from ..merging.run import Progress as MergeProgress

# A terminal that says less than the first (0 where it does not know) is written to as if it had the second.
LEAST_WIDTH, USUAL_WIDTH = 20, 80


def _console(**options: Any) -> Console:
    said = os.environ.get("COLUMNS", "")
    unusable = said.isdecimal() and int(said) < LEAST_WIDTH  # at 0 rich would print nothing at all
    return Console(highlight=False, width=USUAL_WIDTH if unusable else None, **options)


# Results go to standard output; progress and errors to standard error, so that output can be piped.
out = _console()
err = _console(stderr=True)

_BEFORE_A_UNIT = re.compile(r"(?<=\d) (?=(?:B|kB|MB|GB|s|min|h)\b)")

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


def write(text: str) -> None:
    """A piece of an answer as it is made."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    """A line of results that is not broken at the terminal's width."""
    out.print(text, markup=False, soft_wrap=True)


def tell(text: str, indent: int = 2, to: Console | None = None) -> None:
    """Sentences of results, a line each: in a terminal broken between words, never inside one or before a unit.

    Args:
        indent: spaces before its further lines.
        to: by default standard output.
    """
    to = to or out
    if not to.is_terminal:
        to.print(text.replace("\N{NO-BREAK SPACE}", " "), markup=False, soft_wrap=True)
        return
    whole = _BEFORE_A_UNIT.sub("\N{NO-BREAK SPACE}", text)
    width = to.width if to.width >= LEAST_WIDTH else USUAL_WIDTH
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    for sentence in whole.split("\n"):
        for line in wrapper.wrap(sentence) or [""]:
            to.print(line.replace("\N{NO-BREAK SPACE}", " "), markup=False, soft_wrap=True)


def over(line: str, *, last: bool) -> None:
    """A line of progress that the next one is written over: in a terminal never wider than that is."""
    if not err.is_terminal:
        err.print(line, markup=False, soft_wrap=True)
        return
    room = max(err.width - 1, 1)
    short = line if cell_len(line) <= room else set_cell_size(line, room - 1) + "…"
    err.print(set_cell_size(short, room), end="\n" if last else "\r", markup=False, soft_wrap=True)


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
def merge_progress(quiet: bool, work: str = "merging") -> Iterator[OnProgress | None]:
    """A progress line with rate, time left and peak memory; plain lines where there is no terminal."""
    if quiet:
        yield None
    elif not err.is_terminal:
        yield _PlainProgress(work)
    else:
        columns = (TextColumn(work), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
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
    def __init__(self, work: str) -> None:
        self._work, self._next = work, 0.0

    def __call__(self, step: MergeProgress) -> None:
        share = step.done / step.total
        if share >= self._next or step.done == step.total:
            self._next = share + PLAIN_STEP
            err.print(f"{self._work}: {share:4.0%}  {_note(step)}", soft_wrap=True)


def _note(step: MergeProgress) -> str:
    rate = (step.done - step.resumed) / step.seconds if step.seconds else 0.0
    return f"{size(rate)}/s, {duration(step.seconds_left)} left, peak memory {size(step.peak_memory)}"


def print_peft_export(written: PeftExport, bundle: Path) -> None:
    """Where a PEFT adapter is, and what plain PEFT leaves out of it."""
    say(f'{written.folder}: opens with PeftModel.from_pretrained(base, "{written.folder}") over {bundle}')
    if written.dropped_ratio_error:
        tell(
            f"plain PEFT has no place for the expert's scale ratios: without them a tensor is off by up to "
            f"{written.dropped_ratio_error:.2g} of its norm ({written.worst_tensor}), where compression lost "
            f"up to {written.compression_error:.2g}. Merge with `scale: shared` for an exact adapter."
        )


def hush_libraries() -> None:
    """transformers draws progress bars of its own for loading and saving; the command line has its own words."""
    from logging import getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):  # of kernels for other machines, when a base is quantised
        getLogger(name).setLevel("ERROR")


def log_to_stderr(level: str) -> None:
    """polymerge's own log lines, with their times."""
    import logging

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level="WARNING")
    logging.getLogger("polymerge").setLevel(level)


def hush_harness() -> None:
    """lm-evaluation-harness logs every step and draws a bar for each; the command line has its own words. Called
    before any library is imported that draws bars."""
    import logging

    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    hush_libraries()
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


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


@contextmanager
def assess_progress(quiet: bool) -> Iterator[OnAssess | None]:
    """A line for every candidate and task, and for every chunk of questions."""

    def show(step: AssessProgress) -> None:
        if step.total and step.done == step.total:
            return
        done = f": {step.done} of {step.total}" if step.total else ""
        line = f"{step.step} of {step.steps}  {step.candidate} on {_task_name(step.task)}{done}"
        err.print(line, markup=False, soft_wrap=True)

    yield None if quiet else show


def _task_name(task: str) -> str:
    """A file's folder and name without the rest of its path."""
    return "/".join(Path(task).parts[-2:]) if task.endswith((".jsonl", ".yaml", ".yml")) else task


def print_assessment(assessment: Assessment) -> None:
    """Accuracy by model and field, what each costs, why one has no figure, and the proposal."""
    table = Table("model", *map(escape, assessment.fields), "peak memory", "tokens/s")
    for row in assessment.candidates:
        reached = row.accuracies(assessment.fields)
        cells = [f"{reached[name]:.1%}" if name in reached else "-" for name in assessment.fields]
        rate = f"{row.tokens_per_second:.0f}" if row.tokens_per_second else "-"
        name = f"{row.name} (thinker)" if row.role == "thinker" else row.name
        table.add_row(name, *cells, size(row.peak_memory) if row.peak_memory else "-", rate)
    out.print(table)
    for row in assessment.candidates:
        for name, reason in row.failed.items():
            out.print(f"{row.name}: {name or 'not measured'}: {reason}", markup=False, soft_wrap=True)
    if assessment.proposals is not None:
        search = "all" if assessment.proposals.exhaustive else "the best of a growing search among"
        out.print(f"proposal: {assessment.proposals.why}", markup=False, soft_wrap=True)
        out.print(f"compared: {search} {assessment.proposals.sets} sets", markup=False)
        for note in assessment.proposals.notes:
            out.print(f"note: {note}", markup=False, soft_wrap=True)


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
    prompt = "An order for Olga: 12 stamps."
    out.print(f'try: polymerge generate {result.bundle} --expert {first} "{prompt}"', markup=False, soft_wrap=True)


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
