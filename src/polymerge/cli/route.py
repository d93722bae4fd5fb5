"""`polymerge route`: which expert would answer, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..router.route import Route


def route(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    text: Annotated[str | None, typer.Argument(help="The request.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Instead, requests from a JSONL file whose rows have `prompt`.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a request.")] = False,
) -> None:
    """Say which expert a request goes to, how sure that is, and which training samples speak for it."""
    from ..router.requests import route as run
    from .console import print_json
    from .logs import hush_libraries
    from .progress import waiting

    hush_libraries()
    with waiting(f"loading {bundle}", quiet=as_json) as loaded:
        for request, routed in run(bundle, text, file=file, device=device):
            loaded()
            if as_json:
                print_json(routed.to_json())
            elif file is None:
                _print(routed)
            else:
                line = " ".join(request.split())[:80]
                print(f"{_expert(routed)}\t{routed.field}\t{routed.confidence:.3f}\t{line}")


def _expert(route: Route) -> Any:
    return "average" if route.expert is None else route.expert


def _print(route: Route) -> None:
    from .console import out

    out.print(f"expert       {_expert(route)}{' (fallback)' if route.fallback else ''}", markup=False)
    out.print(f"field        {route.field}", markup=False)
    out.print(f"confidence   {route.confidence:.3f}")
    out.print(f"reason       {route.reason}", markup=False, soft_wrap=True)
    for near in route.neighbours:
        text = " ".join(near.text.split())
        out.print(f"  {near.similarity:.2f} {near.field}: {text[:100]}", markup=False, soft_wrap=True)
    if route.truncated:
        out.print(f"note: {route.truncated} tokens were cut from the middle before embedding")
