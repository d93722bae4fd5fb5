"""`polymerge route`: which expert would answer, and why."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..router.route import Route
    from ..router.router import Router

BATCH = 64  # rows of a file that are routed together


def route(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    text: Annotated[str | None, typer.Argument(help="The request.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Instead, requests from a JSONL file whose rows have `prompt`.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a request.")] = False,
) -> None:
    """Say which expert a request goes to, how sure that is, and which training samples speak for it."""
    from .console import hush_libraries, print_json
    from .routing import open_router

    if (text is None) == (file is None):
        raise typer.BadParameter("give either a text or --file")
    hush_libraries()
    router = open_router(bundle, device)
    if text is not None:
        [found] = router.route([text])
        if as_json:
            print_json(found.to_json())
        else:
            _print(found)
        return
    assert file is not None
    for prompt, found in _routes(router, file):
        if as_json:
            print_json(found.to_json())
        else:
            line = f"{_expert(found)}\t{found.field}\t{found.confidence:.3f}\t{' '.join(prompt.split())[:80]}"
            print(line)


def _routes(router: Router, file: Path) -> Iterator[tuple[str, Route]]:
    from ..data.schema import PromptRow, read_as

    rows = read_as(PromptRow, file)
    while prompts := [row.prompt for _, row in islice(rows, BATCH)]:
        yield from zip(prompts, router.route(prompts), strict=True)


def _expert(found: Route) -> Any:
    return "average" if found.expert is None else found.expert


def _print(found: Route) -> None:
    from .console import out

    out.print(f"expert       {_expert(found)}{' (fallback)' if found.fallback else ''}", markup=False)
    out.print(f"field        {found.field}", markup=False)
    out.print(f"confidence   {found.confidence:.3f}")
    out.print(f"reason       {found.reason}", markup=False, soft_wrap=True)
    for near in found.neighbours:
        text = " ".join(near.text.split())
        out.print(f"  {near.similarity:.2f} {near.field}: {text[:100]}", markup=False, soft_wrap=True)
    if found.truncated:
        out.print(f"note: {found.truncated} tokens were cut from the middle before embedding")
