"""How many bytes a bundle will take, and which rate makes it fit: the plan's arithmetic, made tight.

A plan counts as if no two experts shared a tensor and leaves the files' headers out. Here tensors that all experts
share are found by comparing them (of two that differ, the first rows are read), and headers are counted, so that the
figure is an upper bound that is near. Knows nothing of quality.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..bundle.files import slabs
from ..merging.layout import layout_of
from ..merging.plan import MergePlan, replanned
from ..merging.treatment import TensorTask
from ..recipe.merge import CodeName
from ..recipe.rates import count_layers, tilted
from ..sources.checkpoint import Checkpoint

# Rates are whole numbers of ten-thousandths: one step is 0.01% of what an expert's matrices take in 16 bits.
STEPS = 10_000
# Of a scale in its file's header, beside its name: dtype, shape and offsets; and of the file.
ENTRY_BYTES = 160
FILE_BYTES = 512


@dataclass(frozen=True)
class Fitting:
    """The experts of a plan at any rate and with any code.

    Attributes:
        plan: at whatever rate it was made.
        shared: names of the tensors that are the same in all experts, to the bit.
        tilt: how much more of the first layer is kept than of the last (`polymerge.recipe.rates.tilted`).
    """

    plan: MergePlan
    shared: frozenset[str]
    tilt: float = 0.0

    @classmethod
    def of(cls, plan: MergePlan) -> Fitting:
        """Compares the experts' tensors."""
        apart = [task for task in plan.tasks if task.against_base or task.treatment == "keep"]
        return cls(plan, frozenset(task.name for task in apart if _is_shared(task, plan.checkpoints)))

    def at(self, keep: int, code: CodeName) -> MergePlan:
        """The plan that keeps so many ten-thousandths of the residuals: rate 1 at 0, rate 0 at 10,000."""
        rates = tilted((STEPS - keep) / STEPS, self._layers if self.tilt else 0, self.tilt)
        return replanned(self.plan, compress_rate=rates, code=code)

    @cached_property
    def _layers(self) -> int:
        return count_layers(task.record.module for task in self.plan.tasks)

    def most(self, limit: int, code: CodeName) -> int | None:
        """The most ten-thousandths that can be kept in `limit` bytes; None where the average is too large."""
        if self.bytes(self.at(0, code)) > limit:
            return None
        dropped = bisect_left(range(STEPS), True, key=lambda step: self.bytes(self.at(STEPS - step, code)) <= limit)
        return STEPS - dropped

    def most_compressed(self, code: CodeName) -> int:
        """The most ten-thousandths at which any matrix is still stored as factors; all is whole beyond."""
        return bisect_left(range(1, STEPS), True, key=lambda keep: not _has_factors(self.at(keep, code)))

    def bytes(self, plan: MergePlan) -> int:
        """Bytes of all weight files of the plan's bundle, at most."""
        base = sum(_base_bytes(task, plan) for task in plan.tasks)
        headers = sum(layout_of(plan).rooms.values())
        return base + headers + sum(self._expert_bytes(plan, expert) + FILE_BYTES for expert in plan.checkpoints)

    def _expert_bytes(self, plan: MergePlan, expert: str) -> int:
        apart = [task for task in plan.tasks if task.name not in self.shared]
        whole = {t.name for t in apart if t.treatment in ("full", "keep") and not t.as_difference}
        modules = {task.record.module for task in plan.tasks if task.name in whole}
        # PEFT takes whole modules, so an own weight brings the module's other tensors along.
        whole |= {task.name for task in plan.tasks if task.record.module in modules and not task.as_difference}
        total = sum(_base_bytes(task, plan) for task in plan.tasks if task.name in whole)
        few = [task for task in plan.tasks if task.tables and task.treatment == "average"]
        total += sum(task.expert_bytes(plan.dtype, plan.code, expert) for task in few)
        biases = [task for task in apart if task.treatment == "keep" and task.as_difference]
        total += sum(4 * task.numel for task in biases)
        for task in (task for task in plan.tasks if task.against_base):
            total += 4 + ENTRY_BYTES + len(task.name)  # its scale
            if task.treatment == "low_rank" and task.name not in self.shared:
                total += task.expert_bytes(plan.dtype, plan.code, expert)
            # PEFT wants a bias beside all factors, and factors beside it.
            if biases and plan.code.peft_readable and not task.record.slice:
                total += 4 * sum(task.matrix_shape)
        return total


def has_full_rank(plan: MergePlan) -> bool:
    """Whether a matrix's factors have all the rank that it can use, so that more bytes buy nothing there."""
    linear = (task for task in plan.tasks if task.record.role == "linear")
    return any(t.treatment == "low_rank" and t.rank == min(t.matrix_shape) for t in linear)


def _has_factors(plan: MergePlan) -> bool:
    return any(task.treatment != "full" for task in plan.tasks if task.record.role == "linear")


def _base_bytes(task: TensorTask, plan: MergePlan) -> int:
    width = plan.dtype.itemsize
    if task.treatment == "copy":  # as the first expert has it
        first, source = next(iter(task.sources.items()))
        bits = re.search(r"\d+", plan.checkpoints[first].tensors[source].stored_as)
        width = int(bits[0]) // 8 if bits else 1
    return task.numel * width


def _is_shared(task: TensorTask, checkpoints: Mapping[str, Checkpoint]) -> bool:
    shapes = {checkpoints[expert].tensors[source].shape for expert, source in task.sources.items()}
    if len(shapes) > 1:  # tables of other vocabularies
        return False
    rows = [(0, 1), *slabs(task.shape)]  # of two that differ the first row is enough
    return all(_equal(task, checkpoints, pair, rows) for pair in pairwise(task.sources))


def _equal(
    task: TensorTask, checkpoints: Mapping[str, Checkpoint], pair: tuple[str, str], rows: Sequence[tuple[int, int]]
) -> bool:
    def read(expert: str, start: int, stop: int) -> Tensor:
        checkpoint, name = checkpoints[expert], task.sources[expert]
        values = checkpoint.read_rows(name, start, stop) if task.shape else checkpoint.read(name)
        return values.contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(read(pair[0], *part), read(pair[1], *part)) for part in rows)
