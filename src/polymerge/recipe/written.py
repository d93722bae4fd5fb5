"""A recipe as the YAML file that says it. Does not know how such a file is read (`polymerge.recipe.merge`)."""

from __future__ import annotations

from typing import Any

import yaml

from ..paths import here
from .merge import Recipe
from .source import Source


def recipe_text(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads as this recipe from any folder: local paths are whole, defaults are left out."""
    said: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True)
    experts = {name: _source(source) for name, source in recipe.experts.items()}
    if recipe.calibration:
        said["calibration"] = {name: _whole(file) for name, file in recipe.calibration.items()}
    text: str = yaml.safe_dump({**said, "experts": experts}, sort_keys=False, allow_unicode=True)
    return text


def _source(source: Source) -> str | dict[str, str]:
    said = {key: _whole(value) for key, value in source.model_dump(exclude_none=True).items()}
    return said["source"] if len(said) == 1 else said


def _whole(text: str) -> str:
    path = here(text)
    return str(path.absolute()) if path else text
