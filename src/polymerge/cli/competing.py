"""How `polymerge compete` tells of a run: its progress and its summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import duration, err, out, over, size, tell

if TYPE_CHECKING:
    from ..compete.clock import OnProgress, Progress
    from ..compete.expected import Expected, OnPlan
    from ..compete.run import Summary


TOO_MUCH = "where that is too much, thoughts are left out first and texts are cut, no row is dropped"


def compete_progress(quiet: bool) -> OnProgress | None:
    """A line for every piece of a competition's run, with the time left of the work and of the limit."""
    if quiet:
        return None

    def show(step: Progress) -> None:
        memory = f", peak memory {size(step.peak_memory)}"
        memory += f" of {size(step.memory_limit)}" if step.memory_limit else ""
        limit = f"{duration(max(0.0, step.time_limit - step.seconds))} of the limit"
        line = f"{step.phase}: {step.done} of {step.total} rows, {duration(step.seconds_left)} left, {limit}{memory}"
        over(line, last=step.done == step.total)

    return show


def compete_plan(quiet: bool) -> OnPlan:
    """What a run expects to take, in two lines before it begins."""

    def show(plan: Expected) -> None:
        if quiet:
            return
        thoughts = f", {plan.thoughts} thoughts of {plan.thought_tokens:,} more" if plan.thoughts else ""
        err.print(
            f"plan: {plan.rows} rows, {plan.read:,} tokens to read, at most {plan.written:,} to write{thoughts}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
        needed = "could not be timed" if plan.seconds is None else f"at most about {duration(plan.seconds)}"
        limit = f" of {size(plan.memory_limit)}" if plan.memory_limit else ""
        line = f"{needed}, {duration(plan.seconds_left)} are left; memory about {size(plan.memory)}{limit}"
        err.print(f"      {line}{'' if plan.fits else '; ' + TOO_MUCH}", soft_wrap=True, highlight=False)

    return show


def print_summary(summary: Summary, tokens: int) -> None:
    """What a competition's run did, and what may be wrong with its answers."""
    from ..compete.flaws import words_of

    late = " [red](over the limit)[/]" if summary.seconds > summary.time_limit else ""
    out.print(f"{summary.rows} rows in {duration(summary.seconds)} of {duration(summary.time_limit)}{late}, ", end="")
    out.print(f"peak memory {size(summary.peak_memory)}")
    experts = ", ".join(f"{name} {rows}" for name, rows in summary.experts.items())
    out.print(f"experts: {experts or 'none'}", markup=False)
    out.print(f"staged: {summary.staged} rows", markup=False)
    for way, rows in summary.asked.items():
        out.print(f"asked: {rows} rows: {way}", markup=False)
    for reason, rows in summary.direct.items():
        out.print(f"direct: {rows} rows: {reason}", markup=False, soft_wrap=True)
    for name, value in summary.scores.items():
        out.print(f"{name}: {value:.4f}")
    if summary.scores and summary.scored < summary.rows:
        tell(f"(scores are means over the rows with a target: {summary.scored} of {summary.rows})")
    warning = words_of(summary.written, summary.flaws, tokens)
    if warning:
        tell(f"warning: {warning}", to=err)
    for line in summary.skipped:
        err.print(f"skipped: {line}", markup=False, soft_wrap=True)
