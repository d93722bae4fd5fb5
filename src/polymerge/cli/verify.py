"""`polymerge verify`: is the bundle whole, and true to its sources?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    sources: Annotated[
        bool, typer.Option("--sources", help="Rebuild every expert and compare it with its checkpoint.")
    ] = False,
    source: Annotated[list[str] | None, typer.Option(help="NAME=SOURCE, where a checkpoint has moved.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but problems.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every hash and the structure; with --sources also the experts themselves. Exits with 2 on problems."""
    from ..merging.sources import verify as run
    from .console import err, out, print_json

    def show(what: str) -> None:
        if not (quiet or as_json):
            err.print(f"checking {what}", markup=False)

    moved = named_sources(source or [])
    found = run(bundle, sources=sources or bool(moved), moved=moved, progress=show)
    if as_json:
        print_json(
            {
                "ok": found.ok,
                "files": found.files,
                "problems": found.problems,
                "sources": [asdict(s) for s in found.sources],
            }
        )
    else:
        for problem in found.problems:
            err.print(f"problem: {problem}", markup=False, soft_wrap=True)
        if not quiet:
            for check in found.sources:
                out.print(
                    f"{check.expert}: {check.exact} of {check.tensors} tensors exact, worst relative error "
                    f"{check.worst_error:.3g} ({check.worst_tensor})",
                    markup=False,
                    soft_wrap=True,
                )
            if found.ok:
                out.print(f"{bundle}: whole ({found.files} files)", markup=False)
    if not found.ok:
        raise typer.Exit(2)


def named_sources(pairs: list[str]) -> dict[str, str]:
    """["math=path"] -> {"math": "path"}."""
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (name and separator and value):
            raise typer.BadParameter(f"{pair!r} is not NAME=SOURCE")
    return {pair.partition("=")[0]: pair.partition("=")[2] for pair in pairs}
