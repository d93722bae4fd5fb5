"""Who does the tasks of a merge: threads of this process. `polymerge.merging.ray` is the machines of a cluster.

An executor is a function that is given the numbers of the tensors to do and yields each with its note, in any order;
the bundle's bytes depend on neither the order nor the executor. Knows tasks and workers; the order of a merge is
`polymerge.merging.run`'s, and the arithmetic `polymerge.merging.compress`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ..bundle.manifest import Method
from ..host import pick_device
from ..method.codes import code_of
from ..recipe.merge import Recipe
from ..sources.checkpoint import Checkpoint
from .compress import Settings, compress_tensor
from .journal import Note, PieceWriter, Staging
from .plan import MergePlan
from .reading import reader_of
from .treatment import TensorTask

Executor = Callable[[MergePlan, Staging, Sequence[int]], Iterator[tuple[int, Note]]]


def in_threads(plan: MergePlan, staging: Staging, todo: Sequence[int]) -> Iterator[tuple[int, Note]]:
    """Does a plan's tasks with the recipe's `workers`, in this process."""
    settings = settings_of(plan.recipe, plan.dtype, plan.recipe.device)

    def work(index: int) -> Note:
        with staging.tensor(index) as writer:
            note = compress_task(plan.tasks[index], plan.checkpoints, settings, writer)
        return staging.finish(index, note)

    if plan.recipe.workers == 1:
        for index in todo:
            yield index, work(index)
        return
    # The arithmetic releases the interpreter's lock, and every thread uses the same number of cores for a product, so
    # that its result does not depend on how many threads there are.
    with ThreadPoolExecutor(plan.recipe.workers) as pool:
        futures = {pool.submit(work, index): index for index in todo}
        try:
            for future, index in futures.items():
                yield index, future.result()
        finally:
            for future in futures:
                future.cancel()


def compress_task(
    task: TensorTask, checkpoints: Mapping[str, Checkpoint], settings: Settings, writer: PieceWriter
) -> Note:
    """One tensor, from its checkpoints to its finished pieces. Independent of every other tensor."""
    with torch.no_grad():
        report = compress_tensor(task, settings, reader_of(checkpoints), writer.emit)
    return writer.note(report.digests, report.scales, report.stats)


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
