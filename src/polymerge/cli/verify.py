"""`polymerge verify`: is the bundle whole, and true to its sources?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    sources: Annotated[
        bool, typer.Option("--sources", help="Rebuild every expert and compare it with its checkpoint.")
    ] = False,
    source: Annotated[list[str] | None, typer.Option(help="NAME=SOURCE, where a checkpoint has moved.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but problems.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every hash and the structure; with --sources also the experts themselves. Exits with 2 on problems."""
    from ..merging.sources import verify as run
    from .console import err, print_json, tell
    from .words import read_pairs

    def show(what: str) -> None:
        if not (quiet or as_json):
            err.print(f"checking {what}", markup=False)

    checked = run(bundle, sources=sources, source=read_pairs(source), progress=show)
    if as_json:
        print_json(
            {
                "ok": checked.ok,
                "files": checked.files,
                "sealed": checked.sealed,
                "problems": checked.problems,
                "sources": [asdict(s) for s in checked.sources],
            }
        )
    else:
        for problem in checked.problems:
            err.print(f"problem: {problem}", markup=False, soft_wrap=True)
        if not quiet:
            for check in checked.sources:
                tell(
                    f"{check.expert}: {check.exact} of {check.tensors} tensors exact, worst relative error "
                    f"{check.worst_error:.3g} ({check.worst_tensor})"
                )
            if checked.ok:
                tell(f"{bundle}: whole ({checked.files} files)")
            if not checked.sealed:
                tell(
                    "its manifest has no digest of itself, as an older polymerge wrote it: what no other "
                    f"file repeats was not checked; `polymerge upgrade {bundle}` adds one"
                )
    if not checked.ok:
        raise typer.Exit(2)
