"""`polymerge quantize`: a bundle whose base is stored in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .words import read_pairs


def quantize(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    base: Annotated[
        str,
        typer.Option(
            help="int8: linear layers of the average to the nearest, a scale a row. gptq-int8, gptq-int4: calibrated."
        ),
    ] = "int8",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE.jsonl to measure on, or calibrate with every second row; else a few built-in prompts."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="For --prompts: rows of each file; by default 32.")] = None,
    device: Annotated[str, typer.Option(help="Of the measurement.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Store a bundle's base in 8 or 4 bits, residuals as they are; what that costs is measured."""
    from ..export import quantize_bundle
    from .console import out, print_json, size, tell
    from .logs import hush_libraries
    from .progress import waiting

    hush_libraries()
    read = read_pairs(prompts, "NAME=FILE") if prompts else None
    with waiting(f"writing {output}, and measuring what it costs", quiet or as_json):
        made = quantize_bundle(bundle, output, base=base, prompts=read, limit=limit, device=device)
    if as_json:
        print_json(made.to_json())
    elif not quiet:
        from rich.table import Table

        table = Table("expert", "KL from the bundle", "same token", "tokens")
        for name, cost in made.costs.items():
            table.add_row(name, f"{cost.kl:.2g}", f"{cost.same_token:.1%}", str(cost.tokens))
        out.print(table)
        tell(
            f"{output}: {size(made.after.total)}, {made.after.total / made.after.one_model:.2f} times one model "
            f"(before {size(made.before.total)}); base in {base}, residuals as they were"
        )
