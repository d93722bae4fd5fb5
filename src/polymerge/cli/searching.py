"""How `polymerge merge --target` reads what is wanted and says what was found; and how a sweep is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table

from .console import duration, err, hush_libraries, out, size
from .verify import named_sources

if TYPE_CHECKING:
    from ..merging.executor import Executor
    from ..recipe.merge import Recipe
    from ..search.examples import Example
    from ..search.find import Found
    from ..search.target import Target


@dataclass(frozen=True)
class Wanted:
    """A target, the held-out prompts to measure it on and the codes that may be used."""

    target: Target
    examples: Mapping[str, Sequence[Example]]
    codes: Sequence[str]

    def find(self, recipe: Recipe, output: Path, *, overwrite: bool, executor: Executor, quiet: bool) -> Found:
        """Searches; the bundles that are measured lie beside the output for a moment."""
        from ..bundle.place import check_output
        from ..search.find import find

        check_output(output.expanduser(), overwrite=overwrite)  # now and not after the work
        folder = next(parent for parent in output.expanduser().absolute().parents if parent.exists())

        def show(text: str) -> None:
            if not quiet:
                err.print(text, markup=False, soft_wrap=True)

        found = find(
            recipe, self.target, self.examples, codes=self.codes, folder=folder, executor=executor, progress=show
        )
        measured = (
            f"{self.target.words(found.point)}, measured merges: {found.merges}" if found.point else "no merge needed"
        )
        show(f"found: compress rate {found.recipe.compress_rate:g} with code {found.recipe.code} ({measured})")
        return found


def read_wanted(
    target: str | None, prompts: list[str] | None, codes: str | None, limit: int | None, fixed: Mapping[str, object]
) -> Wanted | None:
    """The options that belong together; None without a target.

    Args:
        fixed: options, and their values, that a search would overrule.
    """
    if target is None:
        for option, given in {"--prompts": prompts, "--codes": codes, "--limit": limit}.items():
            if given is not None:
                raise typer.BadParameter(f"{option} belongs to --target")
        return None
    for option, value in fixed.items():
        if value is not None:
            raise typer.BadParameter(f"{option} is what --target finds; leave it out, or say which --codes may be used")
    from ..search.examples import LIMIT, read_examples
    from ..search.sweep import CODES
    from ..search.target import read_target

    hush_libraries()
    parsed = read_target(target)
    files = named_sources(prompts or [])
    examples = {name: read_examples(file, limit or LIMIT) for name, file in files.items()}
    return Wanted(parsed, examples, codes.split(",") if codes else CODES)


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
    originals = [_percent(found["original_accuracy"]) for found in experts.values()]
    table.add_row("originals", "", *originals, "", end_section=True)
    for point in points:
        found = [_percent(expert["accuracy"]) for expert in point["experts"].values()]
        style = "bold" if point["on_front"] else None
        table.add_row(point["code"], f"{point['compress_rate']:g}", *found, _percent(point["kept"]), style=style)
    return table


def _percent(share: float | None) -> str:
    """A share for people; a dash where there is none."""
    return "-" if share is None else f"{share:.1%}"
