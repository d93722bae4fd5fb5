"""A bundle's router with models that run in this process.

Knows that transformers runs them. Which model a router embeds with is `polymerge.router.opening`'s to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.bundle import Bundle
from .opening import open_router
from .router import Router

if TYPE_CHECKING:
    from ..engine.base import Engine


def load_engine(bundle: Bundle | str | Path, model: str | None = None, device: str | None = None) -> Engine:
    """The bundle's engine, or another model's by its source."""
    from ..engine.local.engine import HFEngine

    if model is not None:
        return HFEngine.from_checkpoint(model, device=device)
    return HFEngine.from_bundle(bundle, device=device)


def load_router(bundle: Bundle | str | Path, device: str | None = None, *, engine: Engine | None = None) -> Router:
    """The bundle's router. Says where there is none before any model is loaded.

    Args:
        engine: the bundle's, where it is loaded already.

    Raises:
        RouterError: there is none, it is damaged, or it was fitted for another bundle.
    """
    return open_router(
        bundle,
        lambda: load_engine(bundle, None, device) if engine is None else engine,
        lambda model: load_engine(bundle, model, device),
    )
