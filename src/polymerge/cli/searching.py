"""How a sweep is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from .console import duration, out, size


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
    if points[0]["kept"] is not None:
        out.print(_accuracies(points))
    out.print("bold: no other point is smaller and nearer")
    out.print(f"report: {page}", markup=False, soft_wrap=True)


def _accuracies(points: Sequence[Mapping[str, Any]]) -> Table:
    """Every expert's accuracy under its original's, and the mean share that is kept."""
    experts: Mapping[str, Mapping[str, Any]] = points[0]["experts"]
    table = Table(title="accuracy on held-out prompts")
    for column in ("code", "rate", *map(escape, experts), "kept"):
        table.add_column(column, justify="left" if column == "code" else "right")
    originals = [_percent(expert["original_accuracy"]) for expert in experts.values()]
    table.add_row("originals", "", *originals, "", end_section=True)
    for point in points:
        accuracies = [_percent(expert["accuracy"]) for expert in point["experts"].values()]
        style = "bold" if point["on_front"] else None
        table.add_row(point["code"], f"{point['compress_rate']:g}", *accuracies, _percent(point["kept"]), style=style)
    return table


def _percent(share: float | None) -> str:
    """A share for people; a dash where there is none."""
    return "-" if share is None else f"{share:.1%}"
