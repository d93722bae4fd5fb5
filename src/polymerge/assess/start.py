"""What `polymerge assess` starts: an assessment of candidates, or of a bundle's own experts for its router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.hub import hub_id
from ..bundle.place import file_to_write
from ..errors import RecipeError
from ..router.record import assessment_file
from .recipe import load_assess_recipe
from .results import Assessment, write_assessment_table
from .run import OnAssess, assess, assess_bundle


def assess_models(
    source: str | Path | dict[str, Any],
    *,
    data: str | Path | None = None,
    memory_gb: float | None = None,
    max_experts: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    base: str = "16bit",
    fresh: bool = False,
    output: str | Path | None = None,
    progress: OnAssess | None = None,
) -> Assessment:
    """Measures candidates on fields and proposes which to merge; of a bundle, its own experts for its router.

    Args:
        source: a recipe of an assessment or of a merge, or a bundle's folder or hub id.
        data: a folder whose every NAME/test.jsonl is a field.
        memory_gb, max_experts, limit, device: in the place of the recipe's.
        base: of a bundle's average in memory, as `load_model` takes it.
        fresh: measure again what is remembered.
        output: where the assessment is written as JSON; a bundle's goes beside its router by default.

    Raises:
        RecipeError: the recipe, a data set or a task file cannot be used. BundleError: the bundle cannot.
    """
    output = file_to_write(output) if output is not None else None
    given = {"memory_gb": memory_gb, "max_experts": max_experts, "limit": limit, "device": device}
    changes = {name: value for name, value in given.items() if value is not None}
    if isinstance(source, dict) or not _is_bundle(source):
        if base != "16bit":
            raise RecipeError(f"base {base}: candidates are measured as they are; a bundle's average can be held in it")
        assessment = assess(load_assess_recipe(source, data, **changes), fresh=fresh, progress=progress)
    else:
        bundle = Bundle.open(source)
        names = {name: str(source) for name in bundle.experts}
        recipe = load_assess_recipe({"candidates": names, **changes}, data)
        assessment = assess_bundle(bundle, recipe, base=base, fresh=fresh, progress=progress)
        output = output or assessment_file(bundle.path)
    if output is not None:
        write_assessment_table(assessment, output)
    return assessment


def _is_bundle(source: str | Path) -> bool:
    """A folder, or a hub id that is no recipe's file by its name."""
    return Path(source).is_dir() or (Path(source).suffix not in (".yaml", ".yml") and hub_id(source) is not None)
