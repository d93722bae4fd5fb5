"""Which linear layers have adapters over one model as all their experts, so that this very model is their base.

Such an expert is its adapter's factors beyond the base, exactly, at the adapter's own rank whatever the compress rate
is. Against the average it would have the others' factors in its residual too, and a little of the base. Knows
checkpoints' headers and adapters' factors; how these are stored is `polymerge.merging.adapters`'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..recipe.merge import Recipe
from ..recipe.rates import rate_of
from ..sources.checkpoint import Checkpoint, OverBase
from .treatment import TensorTask

# Expert -> a tensor's name in its checkpoint.
Sources = Mapping[str, str]


def with_adapters(
    tasks: Sequence[TensorTask], checkpoints: Mapping[str, Checkpoint], recipe: Recipe
) -> tuple[TensorTask, ...]:
    """The tasks, those over the model under all experts' adapters marked so, unless the recipe wants the average."""
    if not over_adapters((task.sources for task in tasks), checkpoints, recipe):
        return tuple(tasks)
    return tuple(_over_base(task, checkpoints, recipe) for task in tasks)


def over_adapters(tensors: Iterable[Sources], checkpoints: Mapping[str, Checkpoint], recipe: Recipe) -> bool:
    """Whether the experts are stored as adapters' own factors over one model.

    Args:
        tensors: of each, its name in every expert's checkpoint.
    """
    return recipe.adapters == "exact" and recipe.align is None and _one_base(tensors, checkpoints)


def plain_adapters(checkpoints: Mapping[str, Checkpoint], tasks: Sequence[TensorTask]) -> bool:
    """Whether every expert is nothing but an adapter's factors over one model, as servers of adapters take them."""
    if not _one_base((task.sources for task in tasks), checkpoints):
        return False
    names = ((checkpoint, task.sources[expert]) for task in tasks for expert, checkpoint in checkpoints.items())
    sums = [(checkpoint, checkpoint.over_base(name)) for checkpoint, name in names]
    return all(over is not None and over.base is not checkpoint for checkpoint, over in sums)


def _all_sums(sources: Sources, checkpoints: Mapping[str, Checkpoint]) -> dict[str, OverBase] | None:
    """Expert -> its matrix as a sum over its base; None where one of them is no such sum."""
    sums = {expert: checkpoints[expert].over_base(source) for expert, source in sources.items()}
    whole = {expert: over for expert, over in sums.items() if over is not None}
    return whole if len(whole) == len(sums) else None


def _one_base(tensors: Iterable[Sources], checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether the experts, of which one at least is an adapter, have the same model under them."""
    bases: dict[str, Checkpoint] = {}
    for sources in tensors:
        bases |= {e: over.base for e, over in (_all_sums(sources, checkpoints) or {}).items()}
        if bases:
            break
    if all(bases.get(expert) in (None, checkpoint) for expert, checkpoint in checkpoints.items()):
        return False
    return _same_weights(*bases.values())


def _same_weights(first: Checkpoint, *others: Checkpoint) -> bool:
    """By samples of their files; what these do not show is found when the tensors are read."""
    same = first.fingerprint()
    return all(base is first or base.fingerprint() == same for base in others)


def _over_base(task: TensorTask, checkpoints: Mapping[str, Checkpoint], recipe: Recipe) -> TensorTask:
    """At rate 0 experts are stored whole and at rate 1 nothing of theirs is; so is a matrix that is no larger than its
    factors. What no adapter changes is stored once, whatever it is."""
    sums = _all_sums(task.sources, checkpoints)
    if sums is None or not task.record.known or task.treatment == "full":
        return task
    rank, adapters = max(over.rank for over in sums.values()), {e: (over.rank, over.dtype) for e, over in sums.items()}
    if task.record.role != "linear":
        return task if rank else replace(task, adapters=adapters)
    rows, columns = task.shape
    rate = rate_of(recipe.compress_rate, task.record.module, task.record.tensor)
    if rate == 1 or rank * (rows + columns) >= rows * columns:
        return task
    return replace(task, treatment="low_rank", base="adapters", adapters=adapters)
