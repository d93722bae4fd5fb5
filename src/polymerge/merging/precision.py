"""In which dtype a merge stores each tensor: the bundle's, unless the checkpoint or its architecture keeps it apart.

A checkpoint in bfloat16 may hold routers' correction biases or norms in float32, and some architectures compute with
such tensors in float32 whatever the rest is in. They stay so. Knows dtypes and tasks; reads no weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch

from ..errors import SourceError
from ..host import DTYPES, dtype_name
from ..recipe.merge import Recipe
from ..sources.checkpoint import Checkpoint
from .treatment import TensorTask


def bundle_dtype(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], tasks: Sequence[TensorTask]) -> torch.dtype:
    """What the recipe says, or else what the experts are stored in.

    Raises:
        SourceError: they are stored in different ones, and the recipe says nothing.
    """
    if recipe.dtype:
        return DTYPES[recipe.dtype]
    kinds = {expert: main_dtype(expert, checkpoint, tasks) for expert, checkpoint in checkpoints.items()}
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{e}: {dtype_name(d)}" for e, d in kinds.items())
        raise SourceError(f"the experts are stored in different dtypes ({shown}); say `dtype:` in the recipe")
    return _storable(next(iter(kinds.values())))


def check_not_rounded(
    expert: str, checkpoint: Checkpoint, tasks: Sequence[TensorTask], dtype: torch.dtype, there: Iterable[str]
) -> None:
    """That a bundle's dtype holds an expert that comes to it, or that others were rounded to it as its recipe said.

    Args:
        there: what the bundle's experts were stored in.

    Raises:
        SourceError: it would be rounded, and nobody said so.
    """
    stored = _storable(main_dtype(expert, checkpoint, tasks))
    rounded = [name for name in there if _promoted(DTYPES.get(name, dtype), dtype) != dtype]
    if _promoted(stored, dtype) != dtype and not rounded:
        name = dtype_name(dtype)
        raise SourceError(
            f"expert {expert!r} is stored in {dtype_name(stored)} and the bundle in {name}: it would be rounded; "
            f"save it in {name}, or merge all of them anew and say `dtype:` in the recipe"
        )


def main_dtype(expert: str, checkpoint: Checkpoint, tasks: Sequence[TensorTask]) -> torch.dtype:
    """What most of an expert's linear weights are stored in."""
    linear = [task for task in tasks if task.record.role == "linear"] or list(tasks)
    numbers: Counter[torch.dtype] = Counter()
    for task in linear:
        numbers[_dtype(checkpoint, task.sources[expert])] += task.numel
    return max(numbers, key=numbers.__getitem__)


def with_dtypes(
    tasks: Sequence[TensorTask], checkpoints: Mapping[str, Checkpoint], dtype: torch.dtype
) -> tuple[TensorTask, ...]:
    """The tasks, those that are stored in another dtype than the bundle's with it."""
    main = {expert: main_dtype(expert, checkpoint, tasks) for expert, checkpoint in checkpoints.items()}
    return tuple(replace(task, dtype=_own(task, checkpoints, main, dtype)) for task in tasks)


def _own(
    task: TensorTask, checkpoints: Mapping[str, Checkpoint], main: Mapping[str, torch.dtype], dtype: torch.dtype
) -> torch.dtype | None:
    if task.treatment == "copy":  # stored as it is
        return None
    stored = {expert: _dtype(checkpoints[expert], source) for expert, source in task.sources.items()}
    wide = task.record.float32
    kept = [_storable(given) if wide or given != main[expert] else dtype for expert, given in stored.items()]
    widest = reduce(torch.promote_types, kept)
    return None if widest == dtype else widest


def _dtype(checkpoint: Checkpoint, tensor: str) -> torch.dtype:
    return checkpoint.tensors[tensor].dtype or torch.float32


def _promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return torch.promote_types(_storable(one), other)


def _storable(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype
