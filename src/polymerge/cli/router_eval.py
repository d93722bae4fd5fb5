"""`polymerge router eval`: how often the router is right, how well it knows that, and what it does with strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    data: Annotated[Path | None, typer.Option(help="Folder with NAME/test.jsonl; NAME is a field.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Instead, a JSONL file whose rows have `prompt` and name their field.")
    ] = None,
    label: Annotated[str, typer.Option(help="Key of the field in --file; the field none is out of domain.")] = "expert",
    split: Annotated[str, typer.Option(help="Which file of a field's folder.")] = "test",
    samples: Annotated[int | None, typer.Option(help="Samples of a field, at most.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the bundle's router on labelled samples; the result goes into the bundle's report too."""
    from ..router.evaluation import evaluate_router
    from .console import err, print_json
    from .logs import hush_libraries
    from .progress import progress_bar
    from .routing import print_evaluation

    hush_libraries()
    with progress_bar("embedding", quiet or as_json) as show:
        evaluation = evaluate_router(
            bundle, data=data, file=file, label=label, split=split, samples=samples, device=device, progress=show,
            say=lambda text: err.print(text, markup=False, soft_wrap=True),
        )  # fmt: skip
    if as_json:
        print_json({name: value for name, value in evaluation.to_json().items() if name != "picture"})
    else:
        print_evaluation(evaluation)
