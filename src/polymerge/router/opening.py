"""A bundle's router with the engine that embeds for it.

Knows that a router embeds with the bundle's own model unless it was fitted with another. Does not know how either is
run: the caller says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..bundle.bundle import Bundle
from ..engine.base import Engine
from .record import read_record, router_folder
from .router import Router


def open_router(bundle: Bundle | str | Path, engine: Callable[[], Engine], other: Callable[[str], Engine]) -> Router:
    """The bundle's router.

    Args:
        engine: the bundle's; asked for only where the router embeds with it.
        other: the engine of another model, by its source.

    Raises:
        RouterError: there is none, it is damaged, or it was fitted for another bundle.
    """
    bundle = Bundle.open(bundle)
    model = read_record(router_folder(bundle.path)).model
    return Router.load(bundle, engine() if model is None else other(model))
