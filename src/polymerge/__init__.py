"""polymerge: many fine-tuned language models as one bundle.

Everything heavy loads when it is first used: `import polymerge` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .bundle.bundle import Bundle as Bundle
    from .errors import PolymergeError as PolymergeError
    from .export import export_dense as export_dense
    from .export import export_peft as export_peft
    from .merging.grow import add_expert as add_expert
    from .merging.grow import remove_expert as remove_expert
    from .merging.plan import plan_merge as plan_merge
    from .merging.run import merge as merge
    from .merging.sources import verify as verify
    from .model import MixedModel as MixedModel
    from .model import load_model as load_model
    from .recipe.merge import Recipe as Recipe
    from .recipe.merge import load_recipe as load_recipe
    from .router.fit import fit_router as fit_router
    from .router.route import Route as Route
    from .router.router import Router as Router
    from .router.samples import Sample as Sample
    from .router.settings import FitSettings as FitSettings
    from .staged import Pipeline as Pipeline
    from .staged import Question as Question
    from .staged.opening import open_pipeline as open_pipeline

_HOME = {
    "Bundle": "bundle.bundle",
    "FitSettings": "router.settings",
    "MixedModel": "model",
    "Pipeline": "staged",
    "PolymergeError": "errors",
    "Question": "staged",
    "Recipe": "recipe.merge",
    "Route": "router.route",
    "Router": "router.router",
    "Sample": "router.samples",
    "add_expert": "merging.grow",
    "export_dense": "export",
    "export_peft": "export",
    "fit_router": "router.fit",
    "load_model": "model",
    "load_recipe": "recipe.merge",
    "merge": "merging.run",
    "open_pipeline": "staged.opening",
    "plan_merge": "merging.plan",
    "remove_expert": "merging.grow",
    "verify": "merging.sources",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polymerge' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
