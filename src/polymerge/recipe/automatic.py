"""What `auto` stands for in a recipe: for `code`, and for embeddings and heads.

Decided by what was measured (docs/codes.md): int4 with compressed tables is nearer to every fine-tune than published
factors with whole ones, at fewer bytes; adapters over one model are exact as the factors that they are. Knows keys and
values; what the experts are is told by who opened them.
"""

from __future__ import annotations

from ..method.codes import NEAREST, PUBLISHED
from .merge import AUTO, Recipe


def settled(recipe: Recipe, *, adapters: bool) -> Recipe:
    """The recipe with what its `auto`s stand for. Who names a code has whole tables, unless they say otherwise.

    Args:
        adapters: whether the experts are stored as adapters' own factors over one model.
    """
    code, tables = recipe.code, "keep"
    if code == AUTO:  # at rate 0 experts are whole, and at rate 1 the average is all there is
        code = PUBLISHED if adapters or recipe.compress_rate in (0.0, 1.0) else NEAREST
        tables = "compress" if code == NEAREST else "keep"
    chosen = {key: tables for key in ("embeddings", "lm_head") if getattr(recipe, key) == AUTO}
    return recipe.model_copy(update={"code": code, **chosen})
