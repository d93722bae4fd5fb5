"""Requests, one or a file of them, and where a bundle's router sends each: what `polymerge route` does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..bundle.bundle import Bundle
from ..data.schema import PromptRow, read_as
from ..errors import RouterError
from .loading import load_router
from .route import Route, Routes

BATCH = 64  # requests of a file that are routed together


def route(
    bundle: Bundle | str | Path, text: str | None = None, *, file: str | Path | None = None, device: str | None = None
) -> Iterator[tuple[str, Route]]:
    """Where the bundle's router sends a request, or each of a file: (request, route), in their order.

    Args:
        file: instead of a text, a JSONL file whose rows have `prompt`; it is read as routes are taken.

    Raises:
        RouterError: neither or both are given, or there is no router.
        DataError: as the file is read, a row of it is none.
    """
    if (text is None) == (file is None):
        raise RouterError("route: give either a text or --file")
    router = load_router(bundle, device)
    if file is not None:
        return _of_file(router, Path(file))
    return iter([(text or "", router.route([text or ""])[0])])


def _of_file(router: Routes, file: Path) -> Iterator[tuple[str, Route]]:
    rows = read_as(PromptRow, file)
    while prompts := [row.prompt for _, row in islice(rows, BATCH)]:
        yield from zip(prompts, router.route(prompts), strict=True)
