"""`polymerge pull`: a bundle from the model hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def pull(
    repo: Annotated[str, typer.Argument(help="Of a bundle on the hub: org/name or org/name@revision.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the bundle; by default its name.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at the output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bring a bundle from the hub into a folder and check every hash. Run again after a stop, it goes on."""
    from ..hub import pull_bundle
    from .console import print_json, say, size

    bundle = pull_bundle(repo, output, overwrite=overwrite)
    if as_json:
        print_json({"bundle": str(bundle.path), "experts": bundle.experts, "bytes": bundle.sizes().total})
    elif not quiet:
        say(f"{bundle.path}: {len(bundle.experts)} experts in {size(bundle.sizes().total)}, every hash checked")
        say(f"next: polymerge inspect {shlex.quote(str(bundle.path))}")
