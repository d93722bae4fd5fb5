"""What a code of residuals is: how a pair of factors is stored and read back, and what a bundle with it can do.

A code says which rank a compress rate pays for and how a residual gets factors B [out, r] and A [r, in] of it, turns
these into stored tensors, and back.
Codes differ in their files; which there are stands in codes.py. Whoever wants to know something of a code asks one of
its properties: nobody outside this folder compares names.

Pure functions on tensors. Knows nothing of experts or bundles; of files it knows a code's name for one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..host import dtype_name
from .rsvd import rsvd


class Code(ABC):
    """One way to store a pair of factors. What most codes share is given here; a code says where it differs.

    Attributes:
        peft_readable: an expert is a PEFT adapter as it lies there. Its tensors are then `lora_A.weight` and
            `lora_B.weight`.
        file_name: of an expert's tensors. No reader of adapters looks for a file of the name that is given here.
        format_version: of a bundle with this code. Version 1 is that of the published code alone.
        kernel_bits: bits of the whole numbers that the Triton kernel reads, 0 for numbers as they are; None for a code
            that it cannot read.
    """

    peft_readable: bool = False
    file_name: str = "coded_expert.safetensors"
    format_version: Literal[1, 2] = 2
    kernel_bits: int | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """As in the recipe."""

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """What follows the module's name in the keys of the stored tensors. A row of the first is a component."""

    @abstractmethod
    def rank(self, out_features: int, in_features: int, compress_rate: float) -> int:
        """The rank that a compress rate pays for; 0 where the published code's is 0."""

    @abstractmethod
    def bytes(self, out_features: int, in_features: int, rank: int) -> int:
        """Bytes of everything that is stored for a pair of factors."""

    def factorise(
        self, matrix: Tensor, rank: int, *, n_oversamples: int, n_iter: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """A residual [out, in] -> B [out, r] with orthonormal columns and A [r, in], as `rsvd`, which it is."""
        return rsvd(matrix, rank, n_oversamples=n_oversamples, n_iter=n_iter, seed=seed)

    @abstractmethod
    def encode(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:
        """B [out, r] and A [r, in] in float32 -> the stored tensors, by suffix."""

    @abstractmethod
    def check(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        """Raises ValueError where a tensor's shape or dtype is not the code's."""

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """The stored tensors -> B [out, r] and A [r, in] in float32. Raises ValueError as `check` does."""


def check_tensor(key: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Raises ValueError unless a stored tensor has this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{key} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, expected {dtype_name(dtype)} {list(shape)}"
        )
