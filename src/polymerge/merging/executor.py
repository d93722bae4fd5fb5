"""Who does the tasks of a merge: threads of this process. `polymerge.merging.ray` is the machines of a cluster.

An executor is a function that is given the numbers of the tensors to do and yields each, in that order, with the work
that is left: called with `emit`, it gives the tensor's pieces away. What takes arithmetic is done ahead by workers, and
a bounded number of results waits in memory for its turn; all else is done in its turn, a few rows at a time. Knows
tasks and workers; the order of a merge is `polymerge.merging.run`'s, the arithmetic `polymerge.merging.compress`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bundle.files import Rows
from ..bundle.manifest import Method
from ..host import pick_device
from ..method.codes import code_of
from ..method.weights import Weights
from ..recipe.merge import Recipe
from ..sources.checkpoint import Checkpoint
from .adapters import compress_over_base
from .compress import Settings, compress_tensor
from .outcome import TensorReport
from .plan import MergePlan
from .reading import reader_of, sums_of
from .tables import Emit
from .treatment import TensorTask

Work = Callable[[Emit], TensorReport]
Executor = Callable[[MergePlan, Sequence[int]], Iterator[tuple[int, Work]]]


@dataclass(frozen=True)
class Made:
    """A tensor that was done before its turn: its pieces (owner, key, values) on the CPU, and its report."""

    pieces: tuple[tuple[str | None, str, Tensor], ...]
    report: TensorReport

    def give(self, emit: Emit) -> TensorReport:
        """The `Work` that is left."""
        for piece in self.pieces:
            emit(*piece)
        return self.report


def in_threads(plan: MergePlan, todo: Sequence[int]) -> Iterator[tuple[int, Work]]:
    """Does a plan's tasks with the recipe's `workers`, in this process."""
    if plan.recipe.workers == 1:
        yield from ((index, _in_its_turn(plan, index)) for index in todo)
        return
    settings = settings_of(plan.recipe, plan.dtype, plan.recipe.device)
    # The arithmetic releases the interpreter's lock, and every thread uses the same number of cores for a product, so
    # that its result does not depend on how many threads there are.
    with ThreadPoolExecutor(plan.recipe.workers) as pool:

        def start(index: int) -> Callable[[], Made]:
            task = plan.tasks[index]
            return pool.submit(make, task, plan.checkpoints, settings, plan.weights(task)).result

        try:
            yield from in_turn(plan, todo, start, ahead=plan.recipe.workers + 1)
        finally:
            pool.shutdown(cancel_futures=True)


def in_turn(
    plan: MergePlan, todo: Sequence[int], start: Callable[[int], Callable[[], Made]], *, ahead: int
) -> Iterator[tuple[int, Work]]:
    """The tasks in order, those of linear weights started beforehand.

    Args:
        start: begins a task somewhere; what it returns waits for the result.
        ahead: how many are begun and not yet given away at most, for their results are in memory.
    """
    begun: dict[int, Callable[[], Made]] = {}
    left = (index for index in todo if plan.tasks[index].against_base)
    for index in todo:
        while len(begun) < ahead and (another := next(left, None)) is not None:
            begun[another] = start(another)
        yield index, begun.pop(index)().give if index in begun else _in_its_turn(plan, index)


def make(
    task: TensorTask, checkpoints: Mapping[str, Checkpoint], settings: Settings, weights: Mapping[str, Weights]
) -> Made:
    """One tensor, from its checkpoints to its pieces. Independent of every other tensor."""
    pieces: list[tuple[str | None, str, Tensor]] = []

    def keep(owner: str | None, key: str, tensor: Tensor | Rows) -> None:
        whole = torch.cat(list(tensor.parts)) if isinstance(tensor, Rows) else tensor
        pieces.append((owner, key, whole.detach().cpu().clone()))  # whoever emits a tensor may go on with its memory

    report = compress_task(task, checkpoints, settings, weights, keep)
    return Made(tuple(pieces), report)


def compress_task(
    task: TensorTask,
    checkpoints: Mapping[str, Checkpoint],
    settings: Settings,
    weights: Mapping[str, Weights],
    emit: Emit,
) -> TensorReport:
    """One tensor, from its checkpoints to `emit`."""
    with torch.no_grad():
        if task.base == "adapters":
            return compress_over_base(task, settings, reader_of(checkpoints), sums_of(checkpoints), emit)
        return compress_tensor(task, settings, reader_of(checkpoints), emit, weights)


def _in_its_turn(plan: MergePlan, index: int) -> Work:
    settings = settings_of(plan.recipe, plan.dtype, plan.recipe.device)
    task = plan.tasks[index]
    return lambda emit: compress_task(task, plan.checkpoints, settings, plan.weights(task), emit)


def settings_of(method: Recipe | Method, dtype: torch.dtype, device: str) -> Settings:
    """The arithmetic's part of a recipe, or of the manifest of a bundle that was made of one, on this machine."""
    return Settings(
        dtype=dtype,
        code=code_of(method.code, dtype),
        device=pick_device(device),
        per_expert_scale=method.scale == "per_expert",
        seed=method.seed,
        n_oversamples=method.n_oversamples,
        n_iter=method.n_iter,
    )
