"""polymerge: many fine-tuned language models as one bundle.

Every verb of the command line is a function here (docs/api.md). Everything heavy loads when it is first used:
`import polymerge` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .assess.start import assess_models as assess_models
    from .bundle.bundle import Bundle as Bundle
    from .bundle.inspect import inspect_bundle as inspect_bundle
    from .compete.start import run_competition as run_competition
    from .demo.start import run_demo as run_demo
    from .errors import PolymergeError as PolymergeError
    from .evaluate.start import evaluate_bundle as evaluate_bundle
    from .export import export_dense as export_dense
    from .export import export_gguf as export_gguf
    from .export import export_peft as export_peft
    from .export import export_vllm as export_vllm
    from .export import quantize_bundle as quantize_bundle
    from .hub import pull_bundle as pull_bundle
    from .hub import push_bundle as push_bundle
    from .merging.footprint import footprint as footprint
    from .merging.grow import remove_expert as remove_expert
    from .merging.plan import plan_merge as plan_merge
    from .merging.room import cheapest_change as cheapest_change
    from .merging.sources import verify as verify
    from .merging.upgrade import upgrade as upgrade
    from .model.loading import load_model as load_model
    from .model.mixed import MixedModel as MixedModel
    from .recipe.merge import Recipe as Recipe
    from .recipe.merge import load_recipe as load_recipe
    from .router.evaluation import evaluate_router as evaluate_router
    from .router.fit import fit_samples as fit_samples
    from .router.requests import route as route
    from .router.route import Route as Route
    from .router.router import Router as Router
    from .router.samples import Sample as Sample
    from .router.settings import FitSettings as FitSettings
    from .router.training import fit_router as fit_router
    from .search.add import add_expert as add_expert
    from .search.explore import search_recipe as search_recipe
    from .search.merge import merge as merge
    from .search.sweep import sweep as sweep
    from .serve.start import serve_bundle as serve_bundle
    from .staged import Pipeline as Pipeline
    from .staged import Question as Question
    from .staged import Response as Response
    from .staged.ablation import validate_stages as validate_stages
    from .staged.generate import generate as generate
    from .staged.opening import open_pipeline as open_pipeline

_HOME = {
    "Bundle": "bundle.bundle",
    "FitSettings": "router.settings",
    "MixedModel": "model.mixed",
    "Pipeline": "staged",
    "PolymergeError": "errors",
    "Question": "staged",
    "Recipe": "recipe.merge",
    "Response": "staged",
    "Route": "router.route",
    "Router": "router.router",
    "Sample": "router.samples",
    "add_expert": "search.add",
    "assess_models": "assess.start",
    "cheapest_change": "merging.room",
    "evaluate_bundle": "evaluate.start",
    "evaluate_router": "router.evaluation",
    "export_dense": "export",
    "export_peft": "export",
    "export_gguf": "export",
    "export_vllm": "export",
    "fit_router": "router.training",
    "fit_samples": "router.fit",
    "footprint": "merging.footprint",
    "generate": "staged.generate",
    "inspect_bundle": "bundle.inspect",
    "learn_from_feedback": "router.feedback",
    "load_model": "model.loading",
    "load_recipe": "recipe.merge",
    "merge": "search.merge",
    "open_pipeline": "staged.opening",
    "plan_merge": "merging.plan",
    "quantize_bundle": "export",
    "pull_bundle": "hub",
    "push_bundle": "hub",
    "remove_expert": "merging.grow",
    "route": "router.requests",
    "run_competition": "compete.start",
    "run_demo": "demo.start",
    "search_recipe": "search.explore",
    "serve_bundle": "serve.start",
    "sweep": "search.sweep",
    "upgrade": "merging.upgrade",
    "validate_stages": "staged.ablation",
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
