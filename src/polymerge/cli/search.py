"""`polymerge search`: the recipe that keeps most within a budget of bytes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..method.codes import PLAIN
from .words import Align, Calibration, DType, Method, Norms, RecipeOrExperts, read_pairs, read_recipe


def search(
    recipe: RecipeOrExperts,
    budget: Annotated[str, typer.Option(help="What the bundle may take: 20GB, 600MB or 1.2x (one model's).")],
    prompts: Annotated[list[str], typer.Option(help="NAME=FILE.jsonl for every expert: rows of prompt and answer.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="For recipe.yaml, search.json and search.html.")
    ] = Path("search"),
    trials: Annotated[int, typer.Option(min=1, help="Merges that are measured, at most.")] = 20,
    codes: Annotated[str, typer.Option(help="Codes to choose from, separated by commas.")] = ",".join(PLAIN),
    limit: Annotated[int, typer.Option(min=1, help="Rows of each file that are used.")] = 32,
    dtype: DType = None,
    norms: Norms = None,
    align: Align = None,
    method: Method = None,
    calibration: Calibration = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the recipe that keeps most within a budget: code, scale, embeddings, head and a rate for every layer."""
    from ..bundle.place import folder_to_fill
    from ..report.blocks import plotly
    from ..report.search import write_search
    from ..search.explore import search_recipe as run
    from .console import err, print_json
    from .logs import hush_libraries

    hush_libraries()
    output = folder_to_fill(output)
    plotly()  # missing, it should be missed now and not after the work

    def say(text: str) -> None:
        if not (quiet or as_json):
            err.print(text, markup=False)

    explored = run(
        read_recipe(recipe), budget, read_pairs(prompts, "NAME=FILE"), output, trials=trials, codes=codes.split(","),
        limit=limit, progress=say, dtype=dtype, norms=norms, align=align, method=method,
        calibration=read_pairs(calibration, "NAME=FILE") if calibration else None,
    ).to_json()  # fmt: skip
    page = write_search(explored, output / "search.html", footer=f"polymerge search {' '.join(recipe)}")
    if as_json:
        print_json({**explored, "recipe": str(output / "recipe.yaml"), "report": str(page)})
    else:
        _print(explored, output, page)


def _print(explored: Mapping[str, Any], output: Path, page: Path) -> None:
    from rich.table import Table

    from ..recipe.rates import in_words
    from .console import out, say, size

    best = explored["trials"][explored["best"]]
    table = Table(title=f"recipes within {size(explored['limit'])}: KL of the worst expert (nats a token)")
    for column in ("code", "rate", "scale", "embeddings", "bundle", "worst KL", "top-1"):
        table.add_column(column, justify="left" if column == "code" else "right")
    for trial in sorted(explored["trials"], key=lambda trial: trial["worst_kl"]):
        table.add_row(
            trial["code"],
            in_words(trial["compress_rate"]),
            trial["choice"]["scale"],
            trial["choice"]["embeddings"],
            size(trial["total_bytes"]),
            f"{trial['worst_kl']:.2g}",
            f"{trial['top1']:.2%}",
            style="bold" if trial["on_front"] else None,
        )
    out.print(table)
    out.print("bold: no other trial is smaller and nearer")
    out.print(f"best: worst KL {best['worst_kl']:.2g} in {size(best['total_bytes'])}")
    say(f"report: {page}")
    say(f"next: polymerge merge {shlex.quote(str(output / 'recipe.yaml'))} -o bundle")
