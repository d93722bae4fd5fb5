"""`polymerge push`: a bundle to the model hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def push(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    repo: Annotated[str, typer.Argument(help="Where on the hub: org/name.")],
    public: Annotated[bool, typer.Option("--public", help="Of a new repository: everybody may read it.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also where the repository holds something that is no bundle.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a bundle and its model card to the hub, private unless told otherwise. Run again, it goes on."""
    from ..hub import push_bundle
    from .console import err, print_json, say, size, tell

    def told(text: str) -> None:
        if not (quiet or as_json):
            tell(text, to=err)

    pushed = push_bundle(bundle, repo, public=public, overwrite=overwrite, say=told)
    if as_json:
        print_json(asdict(pushed))
    elif not quiet:
        kind = "private" if pushed.private else "public"
        say(f"{pushed.url}: {pushed.files} files, {size(pushed.bytes)}, {kind}")
        for note in pushed.notes:
            told(f"note: {note}")
        say(f"next: polymerge generate {repo} --expert NAME '...'")
