"""What each choice for embeddings, heads and the code of residuals costs, and what averaging them may lose.

The bytes follow from the plan alone; how far an expert's own are from the average, the merge has measured.
Knows tables; what happens to each is `polymerge.merging.treatment`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..bundle.bundle import Bundle
from ..bundle.stats import relative_error
from ..method.codes import PLAIN
from .plan import MergePlan, replanned
from .treatment import TensorTask, task_of

CHOICES = ("keep", "compress", "average")


def bytes_of_choices(plan: MergePlan) -> dict[str, int]:
    """What all experts together have of embeddings and heads with each choice, at most; nothing where no model has
    any."""
    costs = {}
    for choice in CHOICES:
        recipe = plan.recipe.model_copy(update={"embeddings": choice, "lm_head": choice})
        made = (
            replace(task_of(t.record, t.shape, t.sources, recipe), dtype=t.dtype, tables=t.tables, adapters=t.adapters)
            for t in _tables(plan)
        )
        costs[choice] = sum(
            task.expert_bytes(plan.dtype, plan.code, expert) for task in made for expert in plan.checkpoints
        )
    return costs if any(costs.values()) else {}


def bytes_of_codes(plan: MergePlan) -> dict[str, int]:
    """What all experts together have of residuals at the plan's rate, in each code that needs no extra and in its own;
    nothing where none has any."""
    costs = {}
    for name in dict.fromkeys((*PLAIN, plan.recipe.code)):
        other = replanned(plan, code=name)
        low_rank = [task for task in other.tasks if task.treatment == "low_rank"]
        costs[name] = sum(
            task.expert_bytes(plan.dtype, other.code, expert) for task in low_rank for expert in plan.checkpoints
        )
    return costs if any(costs.values()) else {}


def averaged(plan: MergePlan) -> tuple[TensorTask, ...]:
    """The embeddings and heads of which the bundle holds one for all experts."""
    return tuple(task for task in _tables(plan) if task.treatment == "average")


def moved(plan: MergePlan, bundle: Bundle) -> Mapping[str, float]:
    """Expert -> ||W - W̄|| / ||W|| of its averaged embeddings and heads, as the merge measured it."""
    tensors = {task.name for task in averaged(plan)}
    lines = [line for line in bundle.stats() if line["tensor"] in tensors]
    return {expert: relative_error(line for line in lines if line["expert"] == expert) for expert in plan.checkpoints}


def _tables(plan: MergePlan) -> Iterator[TensorTask]:
    return (task for task in plan.tasks if task.record.role in ("embedding", "lm_head"))
