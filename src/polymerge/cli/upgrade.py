"""`polymerge upgrade`: an old bundle, written as this version would."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def upgrade(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an old bundle anew as this version would; what it answers stays the same."""
    from ..merging.upgrade import upgrade as run
    from .console import print_json, tell

    done = run(bundle)
    if as_json:
        print_json({"before": done.before, "after": done.after, "files": done.files})
    elif not quiet:
        written = ", ".join(done.files) or "nothing was old"
        tell(f"{bundle}: format version {done.before} to {done.after}; written anew: {written}")
