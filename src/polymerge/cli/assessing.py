"""How `polymerge assess` tells of an assessment: its progress, its table and the proposal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from .console import err, out, size

if TYPE_CHECKING:
    from ..assess import Assessment, AssessProgress
    from ..assess.run import OnAssess


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
