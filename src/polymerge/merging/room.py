"""The cheapest change that makes a bundle, its thinker and their caches fit a GPU.

Knows what may be changed and, roughly, what each change loses. Bytes are counted by `polymerge.merging.footprint`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from ..recipe.rates import rate_of
from .footprint import Footprint, footprint
from .plan import MergePlan, replanned

HIGHER_RATE = 0.98


@dataclass(frozen=True)
class Step:
    """One change.

    Attributes:
        loses: how much, against the others. The order is what counts, and it is that of what was measured
            (docs/codes.md): packed residuals lose time alone; a thinker only feeds the formatter; compressed tables
            have 1.08 times the KL of kept ones; a base in 8 bits adds less than residuals leave out; averaged tables
            have 2.5 times the KL, factors many times that of int4, a rate of 0.98 several times that of 0.95; 4 bits
            ruin small models.
        words: as a user writes it.
        recipe: keys of the recipe, `base`, `thinker_base` and `residuals` apart.
    """

    loses: int
    words: str
    recipe: tuple[tuple[str, Any], ...] = ()
    base: str | None = None
    thinker_base: str | None = None
    residuals: str | None = None


NOTHING = Step(0, "")
THINKER = (Step(1, "thinker: base: int8", thinker_base="int8"), Step(2, "thinker: base: nf4", thinker_base="nf4"))
BASE = (Step(4, "--base int8", base="int8"), Step(40, "--base nf4", base="nf4"))
PACKED = (Step(1, "--residuals packed", residuals="packed"),)
TABLES = (
    Step(3, "embeddings: compress", (("embeddings", "compress"), ("lm_head", "compress"))),
    Step(8, "embeddings: average", (("embeddings", "average"), ("lm_head", "average"))),
)
CODE = (Step(12, "code: factors", (("code", "factors"),)),)
RATE = (Step(15, f"compress_rate: {HIGHER_RATE}", (("compress_rate", HIGHER_RATE),)),)


@dataclass(frozen=True)
class Change:
    """What to change, as a user writes it, and what answering needs then. Nothing to change where it fits as it is."""

    words: tuple[str, ...]
    needs: Footprint


def cheapest_change(plan: MergePlan) -> Change | None:
    """Of the changes with which it is within `footprint(plan).limit`, the one that loses least; None where none is.

    Raises:
        SourceError: as `footprint`.
    """
    needs = footprint(plan)
    if needs.fits is not False:
        return Change((), needs)
    counted = cache(lambda steps: footprint(_changed(plan, steps)))
    for steps in sorted(_ways(plan, needs), key=lambda way: (sum(step.loses for step in way), len(way))):
        if (changed := counted(steps)).fits:
            return Change(tuple(step.words for step in steps), changed)
    return None


def _ways(plan: MergePlan, needs: Footprint) -> Iterator[tuple[Step, ...]]:
    """Every choice of one step, or none, of each kind that changes something here."""
    recipe = plan.recipe
    tables = {recipe.embeddings, recipe.lm_head}
    linear = [task for task in plan.tasks if task.record.role == "linear"]
    rates = {rate_of(recipe.compress_rate, t.record.module, t.name) for t in linear if t.rank}
    kinds = (
        THINKER if needs.thinker and needs.thinker_base == "16bit" else THINKER[1:] if needs.thinker else (),
        BASE if plan.base == "16bit" else (),
        PACKED if plan.residuals == "decoded" and plan.code.kernel_bits is not None else (),
        TABLES if "keep" in tables else TABLES[1:] if "compress" in tables else (),
        CODE if not plan.code.peft_readable else (),
        RATE if rates and max(rates) < HIGHER_RATE else (),
    )
    for way in product(*((NOTHING, *steps) for steps in kinds)):
        if steps := tuple(step for step in way if step is not NOTHING):
            yield steps


def _changed(plan: MergePlan, steps: tuple[Step, ...]) -> MergePlan:
    settings: Any = {key: value for step in steps for key, value in step.recipe}
    made = replanned(plan, **settings) if settings else plan
    for step in steps:
        if step.base:
            made = replace(made, base=step.base)
        if step.residuals:
            made = replace(made, residuals=step.residuals)
        if step.thinker_base and made.recipe.thinker:
            thinker = made.recipe.thinker.model_copy(update={"base": step.thinker_base})
            made = replace(made, recipe=made.recipe.model_copy(update={"thinker": thinker}))
    return made
