"""Tensors that hold many matrices, one for each block expert of a mixture, and where each of these lies.

The one rule that says which tensors these are. Knows modules, names and shapes; does not know checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# What modules call the number of their block experts.
COUNTS = ("num_experts", "moe_num_experts", "num_local_experts")


@dataclass(frozen=True)
class Fused:
    """What a tensor of many matrices is.

    Attributes:
        count: of the matrices.
        transposed: they are [in, out], where the model says so; otherwise they are taken for [out, in].
        apart: transformers stores them one by one, or under other names. This checkpoint does not.
    """

    count: int
    transposed: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Slice:
    """Where a matrix lies in a tensor that holds many.

    Attributes:
        tensor: that tensor's name.
        shape: that tensor's: [count, rows, columns], or [count * rows, columns].
        index: which of the matrices it is.
    """

    tensor: str
    shape: tuple[int, ...]
    index: int
    count: int

    @property
    def name(self) -> str:
        """The matrix's own name: the number stands where a module's would."""
        stem = self.tensor.removesuffix(".weight")
        return f"{stem}.{self.index}{self.tensor.removeprefix(stem)}"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[rows, columns], as stored."""
        return math.prod(self.shape[:-1]) // self.count, self.shape[-1]

    @property
    def start(self) -> int:
        """The first of the tensor's rows (of its first dimension) that are the matrix's."""
        return self.index * self.rows

    @property
    def rows(self) -> int:
        """How many rows of the tensor's first dimension there are to a matrix."""
        return self.shape[0] // self.count


def slices_of(tensor: str, shape: tuple[int, ...], count: int) -> list[Slice]:
    """All matrices of a tensor, in their order."""
    return [Slice(tensor, shape, index, count) for index in range(count)]


def fused_parameters(model: torch.nn.Module) -> dict[str, Fused]:
    """The parameters of a model that hold a matrix, to multiply tokens with, for each block expert of a mixture.

    The rule: a parameter of a module whose class is named after experts, that is no bias and no layer of its own; of
    three dimensions [E, m, n], or of two, [E m, n], where the module says how many experts it has; m and n over 1. So
    convolutions, decays and whatever else has three dimensions are none.
    """
    return {
        f"{name}.{leaf}": Fused(count, bool(getattr(module, "is_transposed", False)))
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if (count := _matrices(module, leaf, parameter))
    }


def _matrices(module: torch.nn.Module, name: str, parameter: torch.Tensor) -> int:
    """How many matrices a parameter holds; 0 where it holds none of a mixture's."""
    layer = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    if "expert" not in type(module).__name__.lower() or name.endswith("bias") or layer:
        return 0
    if parameter.dim() == 3:
        return parameter.shape[0] if min(parameter.shape[1:]) > 1 else 0
    if parameter.dim() != 2:
        return 0
    count = next((n for key in COUNTS if isinstance(n := getattr(module, key, None), int) and n > 0), 0)
    rows, columns = parameter.shape
    return count if count and not rows % count and rows > count and columns > 1 else 0
