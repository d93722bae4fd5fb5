"""`polymerge router feedback`: what users said about answers makes the router better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def feedback(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    file: Annotated[
        Path,
        typer.Option(
            help="JSONL file; rows have `prompt`, `expert` and `verdict` (right, wrong) or `right` (true, false)."
        ),
    ],
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit the bundle's router again with feedback from use; a router that would be worse is refused."""
    from ..router.feedback import learn_from_feedback
    from .console import out, print_json
    from .logs import hush_libraries
    from .progress import progress_bar

    hush_libraries()
    with progress_bar("embedding", quiet or as_json) as show:
        learned = learn_from_feedback(bundle, file, device=device, progress=show)
    report = learned.fitted.report
    counts = {"samples": learned.samples, "strangers": learned.strangers, "accuracy": report["accuracy"]}
    if as_json:
        print_json(counts)
    elif not quiet:
        out.print(f"learned      {learned.samples} samples of fields, {learned.strangers} strangers")
        out.print(f"accuracy     {report['accuracy']:.1%} (validation)")
