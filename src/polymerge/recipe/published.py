"""The published method as the recipe's keys: what the word `method: published` stands for.

The setting of the system that won the NeurIPS 2024 LLM Merging Competition (docs/competition.md). Knows keys and
values; what they do is the merge's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rates import PUBLISHED_RATE

PUBLISHED_METHOD: Mapping[str, Any] = {
    "compress_rate": PUBLISHED_RATE,
    "code": "factors",
    "scale": "per_expert",
    "embeddings": "keep",
    "lm_head": "keep",
    "norms": "keep",
    "adapters": "average",
}


def spelled_out(recipe: Any) -> Any:
    """A recipe's dict with the keys that `method: published` stands for, where it does not say them itself; anything
    else as it is."""
    if not isinstance(recipe, Mapping) or recipe.get("method") != "published":
        return recipe
    return {**PUBLISHED_METHOD, **{key: value for key, value in recipe.items() if key != "method"}}
