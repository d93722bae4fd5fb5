"""What a method of delta compression is given, one matrix of one expert at a time, and what it gives back.

The SVD of every matrix's difference from the base is computed once and kept in a folder, for all methods of a run.
Knows experts and their base; does not know methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from peer_methods.gptq import input_moments
from peer_methods.served import load_shared
from peer_methods.task import Task, save_tensors
from polymerge.demo.skills import SkillExample
from polymerge.demo.train import encode, padded
from polymerge.host import pick_device
from polymerge.method.gptq import Moments
from polymerge.method.rsvd import rank_for_rate
from polymerge.sources.checkpoint import Checkpoint

CALIBRATION, BATCH = 64, 8  # training requests, with their answers


@dataclass(frozen=True)
class Coded:
    """A matrix as a method has it.

    Attributes:
        weight: [out, in] float32, what the model is run with.
        disk: bytes as stored, packed. resident: as the method's own published inference holds it. Both beside the base.
        gguf: in a GGUF: of a LoRA adapter in float16, or of the matrix itself; None where it cannot be expressed.
    """

    weight: Tensor
    disk: int
    resident: int
    gguf: int | None


def factor_bytes(rank: int, weight: Tensor) -> int:
    """Of two factors in 16 bits a number."""
    return 2 * rank * sum(weight.shape)


@dataclass(frozen=True)
class Delta:
    """One weight [out, in] of one expert, float32, and what surrounds it.

    Attributes:
        base: the pre-trained weight. average: a function, the mean over the experts.
        u, s, vh: the SVD of weight - base: [out, n], [n], [n, in] with n = min(out, in).
        moments: a function, the second moments of the layer's inputs on the expert's training requests.
        seed: for what a method draws.
    """

    weight: Tensor
    base: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor
    average: Callable[[], Tensor]
    moments: Callable[[], Moments]
    seed: int = 0

    @property
    def numbers(self) -> int:
        return self.weight.numel()

    @property
    def delta(self) -> Tensor:
        return self.weight - self.base

    def rank_for(self, budget: float) -> int:
        """The rank whose factors in 16 bits take at most this share of the matrix."""
        out, in_ = self.weight.shape
        return min(rank_for_rate(out, in_, 1 - budget), out, in_)


# A method with its settings.
Method = Callable[[Delta], Coded]


class ExpertDeltas:
    """All linear weights of one expert.

    Args:
        folder: where SVDs are kept. calibration: training requests with answers.
    """

    def __init__(self, task: Task, expert: str, folder: Path, calibration: tuple[SkillExample, ...]) -> None:
        self.task, self.expert = task, expert
        self._file, self._calibration = folder / f"svd-{expert}.safetensors", calibration[:CALIBRATION]

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        if not self._file.exists():
            self._decompose()
        with safe_open(self._file, "pt") as factors:
            for number, name in enumerate(self.task.linear()):
                u, s, vh = (factors.get_tensor(f"{name}.{part}") for part in ("u", "s", "vh"))
                weight, base = (c.read(name).float() for c in (self._checkpoint, self.task.pretrained))
                yield name, Delta(weight, base, u, s, vh, *self._lazily(name), seed=number)

    @property
    def _checkpoint(self) -> Checkpoint:
        return self.task.checkpoints[self.expert]

    def _lazily(self, name: str) -> tuple[Callable[[], Tensor], Callable[[], Moments]]:
        return (lambda: self.task.average(name)), (lambda: self._moments[name])

    def _decompose(self) -> None:
        tensors = {}
        for name in self.task.linear():
            delta = self._checkpoint.read(name).float() - self.task.pretrained.read(name).float()
            for part, tensor in zip(("u", "s", "vh"), torch.linalg.svd(delta, full_matrices=False), strict=True):
                tensors[f"{name}.{part}"] = tensor
        partial = self._file.with_suffix(".part")
        save_tensors(tensors, partial)
        partial.rename(self._file)

    @cached_property
    def _moments(self) -> dict[str, Moments]:
        model, tokenizer = load_shared(self.task.experts[self.expert])
        model.to(pick_device())
        rows = [encode(tokenizer, example) for example in self._calibration]
        starts = range(0, len(rows), BATCH)
        return input_moments(model, (padded(rows[n : n + BATCH], tokenizer.pad_token_id)[:2] for n in starts))


def largest(cost: Callable[[int], int], most: int, budget: float) -> int:
    """The largest whole number up to `most` whose cost, which rises with it, is within the budget."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low
