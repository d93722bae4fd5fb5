"""`polymerge plan`: what a merge would write, read and need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a merge will write, read and need in memory, without reading a weight."""
    from ..plan import plan_merge
    from ..recipe import load_recipe
    from .console import out, print_json, size

    summary = plan_merge(load_recipe(recipe)).summary()
    if as_json:
        print_json(summary)
        return
    experts = summary["experts"]
    separate, written = summary["separate_models_bytes"], summary["write_bytes"]
    ranks = summary["ranks"]
    out.print(
        f"[bold]{len(experts)} experts of {summary['architecture']}[/], compress rate {summary['compress_rate']:g}"
    )
    for name, source in experts.items():
        out.print(f"  {name}: {source}", markup=False)
    spread = f"rank {ranks[0]} to {ranks[1]}" if ranks else "none"
    out.print(
        f"tensors      {summary['tensors']}, of which {summary['compressed_tensors']} compressed ({spread}); "
        f"linear layers found by {summary['layers_from']}"
    )
    out.print(
        f"writes       {size(written)} in {summary['dtype']}, at most "
        f"({written / separate:.0%} of {size(separate)} apart)"
    )
    out.print(f"  average    {size(summary['base_bytes'])}")
    out.print(f"  an expert  {size(summary['residual_bytes_per_expert'])} of residuals ({summary['code']})", end="")
    out.print(f", {size(summary['own_bytes_per_expert'])} of its own tensors (embeddings, norms ...)")
    out.print(f"disk         {size(2 * written)} while it runs")
    out.print(f"reads        {size(summary['read_bytes'])}")
    out.print(f"memory       about {size(summary['memory_bytes'])} beside the program itself")
    for note in summary["notes"]:
        out.print(f"note: {note}", markup=False)
