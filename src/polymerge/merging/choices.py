"""What each choice for embeddings and heads costs, and what averaging them may lose.

The bytes follow from the plan alone. How far an expert's own are from the average is measured on some of their rows.
Knows tables; what happens to each is `polymerge.merging.treatment`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from ..bundle.bundle import Bundle
from .plan import MergePlan
from .treatment import TensorTask, task_of

CHOICES = ("keep", "compress", "average")
# Rows of every table that are looked at: so many blocks of so many, evenly.
BLOCKS, BLOCK = 16, 64


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


def averaged(plan: MergePlan) -> tuple[TensorTask, ...]:
    """The embeddings and heads of which the bundle holds one for all experts."""
    return tuple(task for task in _tables(plan) if task.treatment == "average")


def moved(plan: MergePlan, bundle: Bundle) -> Mapping[str, float]:
    """Expert -> ||W - W̄|| / ||W|| of its averaged embeddings and heads, over the rows that are looked at. Reads them
    from its checkpoint."""
    apart = dict.fromkeys(plan.checkpoints, 0.0)
    whole = dict.fromkeys(plan.checkpoints, 0.0)
    for task in averaged(plan):
        for start, stop in _blocks(task):
            base = bundle.base.read_rows(task.name, start, stop).double()
            for expert, source in task.sources.items():
                rows = plan.checkpoints[expert].read_rows(source, start, stop).double()
                whole[expert] += float(rows.square().sum())
                apart[expert] += float(torch.sub(rows, base).square().sum())
    return {expert: (apart[expert] / whole[expert]) ** 0.5 if whole[expert] else 0.0 for expert in whole}


def _tables(plan: MergePlan) -> Iterator[TensorTask]:
    return (task for task in plan.tasks if task.record.role in ("embedding", "lm_head"))


def _blocks(task: TensorTask) -> Iterator[tuple[int, int]]:
    """[start, stop) of rows that all experts have."""
    size = min(task.tables.sizes.values()) if task.tables else task.shape[0]
    step = max(BLOCK, size // BLOCKS)
    return ((start, min(start + BLOCK, size)) for start in range(0, size, step))
