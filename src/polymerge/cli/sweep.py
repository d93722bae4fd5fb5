"""`polymerge sweep`: which rate and code give how much for how many bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..method.codes import PLAIN
from .words import (
    Align,
    Calibration,
    DType,
    EmbeddingRate,
    Embeddings,
    LmHead,
    Method,
    Norms,
    RecipeOrExperts,
    Scale,
    read_numbers,
    read_pairs,
    read_recipe,
)


def sweep(
    recipe: RecipeOrExperts,
    prompts: Annotated[list[str], typer.Option(help="NAME=FILE.jsonl for every expert: rows of prompt and answer.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="For sweep.json and sweep.html.")] = Path("sweep"),
    rates: Annotated[str, typer.Option(help="Compress rates, separated by commas.")] = "0.9,0.95,0.98",
    codes: Annotated[str, typer.Option(help="Codes, separated by commas.")] = ",".join(PLAIN),
    limit: Annotated[int, typer.Option(min=1, help="Rows of each file that are used.")] = 32,
    scale: Scale = None,
    dtype: DType = None,
    embeddings: Embeddings = None,
    lm_head: LmHead = None,
    embedding_rate: EmbeddingRate = None,
    norms: Norms = None,
    align: Align = None,
    method: Method = None,
    calibration: Calibration = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Merge at every rate with every code and measure each bundle against the original experts."""
    from ..bundle.place import folder_to_fill
    from ..report.blocks import plotly
    from ..report.sweep import write_sweep
    from ..search.sweep import sweep as run
    from ..search.sweep import to_json
    from .console import err, print_json
    from .logs import hush_libraries
    from .searching import print_sweep

    hush_libraries()
    output = folder_to_fill(output)
    plotly()  # missing, it should be missed now and not after the work

    def say(text: str) -> None:
        if not (quiet or as_json):
            err.print(text, markup=False)

    points = run(
        read_recipe(recipe), read_pairs(prompts, "NAME=FILE"), output, rates=read_numbers(rates, "--rates"),
        codes=codes.split(","), limit=limit, progress=say, scale=scale, dtype=dtype, embeddings=embeddings,
        lm_head=lm_head, embedding_rate=embedding_rate, norms=norms, align=align, method=method,
        calibration=read_pairs(calibration, "NAME=FILE") if calibration else None,
    )  # fmt: skip
    plain = [to_json(point, points) for point in points]
    page = write_sweep(plain, output / "sweep.html", footer=f"polymerge sweep {' '.join(recipe)}")
    if as_json:
        print_json({"points": plain, "report": str(page)})
    else:
        print_sweep(plain, page)
