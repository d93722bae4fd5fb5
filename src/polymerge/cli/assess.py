"""`polymerge assess`: how good every candidate is at every field, and which are worth merging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .words import Base


def assess(
    source: Annotated[Path, typer.Argument(help="A recipe of an assessment or of a merge, or a bundle's folder.")],
    data: Annotated[Path | None, typer.Option(help="Your data: each NAME/test.jsonl here is a field.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="What the proposed bundle and thinker must fit into.")] = None,
    max_experts: Annotated[int | None, typer.Option(help="The largest set to propose.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task, the first ones.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda ...")] = None,
    base: Base = "16bit",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is remembered.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the assessment as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with a heatmap; its script lies beside it.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the tables.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure candidates on fields and propose which to merge; of a bundle, its own experts for its router."""
    from ..assess.start import assess_models
    from ..bundle.place import file_to_write
    from ..report.assessment import write_assessment
    from ..router.record import assessment_file
    from .assessing import assess_progress, print_assessment
    from .console import out, print_json

    html = file_to_write(html, "html") if html is not None else None
    with assess_progress(quiet or as_json) as progress:
        assessment = assess_models(
            source, data=data, memory_gb=memory_gb, max_experts=max_experts, limit=limit, device=device, base=base,
            fresh=fresh, output=output, progress=progress,
        )  # fmt: skip
    if html is not None:
        write_assessment(assessment.to_json(), html)
    if as_json:
        print_json(assessment.to_json())
        return
    print_assessment(assessment)
    written = output or (assessment_file(source) if source.is_dir() else None)
    for what, file in (("assessment", written), ("report", html)):
        if file is not None and not quiet:
            out.print(f"{what}: {file}", markup=False, soft_wrap=True)
