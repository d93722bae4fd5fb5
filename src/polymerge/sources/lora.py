"""What an adapter does to one tensor of its base, row by row, in PEFT's arithmetic.

Pure functions of tensors: knows LoRA, DoRA (Liu et al. 2024, arXiv 2402.09353), the starts that PiSSA (Meng et al.
2024, 2404.02948) and OLoRA (Büyükakyüz 2024, 2406.01775) take out of the base, trained rows of a table, biases, and
factors of a mixture of experts' fused parameter. Knows neither files nor names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

# rows(start, stop) of the tensor before the change, in float32
Rows = Callable[[int, int], Tensor]
Start = Literal["zero", "pissa", "olora"]
SLAB = 4096  # rows of a table that are read at once for the norms of its columns


class Change(ABC):
    """A change of one tensor."""

    @abstractmethod
    def rows(self, before: Rows, start: int, stop: int, size: int) -> Tensor:
        """Rows `start` to `stop` after the change, float32. `size` is the number of all rows."""


@dataclass(eq=False)
class LowRank(Change):
    """W + scaling * B A; with a magnitude m (DoRA) m * W' / ||W'||, with the norm of every output over its inputs.

    Attributes:
        a, b: [r, in] and [out, r], float32.
        transposed: the tensor is [in, out] (Conv1D, or an embedding's table), not [out, in].
        magnitude: [out].
        begins: where the factors began. PiSSA's principal part and OLoRA's QR are taken out of the base, every time
            that PEFT loads the adapter.
        dtype: what the adapter stores its factors in.
    """

    a: Tensor
    b: Tensor
    scaling: float
    transposed: bool = False
    magnitude: Tensor | None = None
    begins: Start = "zero"
    dtype: torch.dtype = torch.float32
    _begin: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _norms: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor."""
        shape = self.b.shape[0], self.a.shape[1]
        return shape[::-1] if self.transposed else shape

    @property
    def rank(self) -> int:
        """Of the whole change; that of a magnitude has none."""
        return len(self.a) * (1 if self.begins == "zero" else 2)

    def factors(self, before: Rows) -> tuple[Tensor, Tensor]:
        """B [out, rank] and A [rank, in] of the whole change, in `dtype`. A magnitude is not in them."""
        a, b = self.a, self.scaling * self.b
        if self.begins != "zero":
            if self._begin is None:
                self._begin = self._beginning(before(0, self.shape[0]))
            a, b = torch.cat([a, self._begin[0]]), torch.cat([b, -self._begin[1]], dim=1)
        return b.to(self.dtype), a.to(self.dtype)

    def rows(self, before: Rows, start: int, stop: int, size: int) -> Tensor:
        changed = self._summed(before, start, stop, size)
        if self.magnitude is None:
            return changed
        if not self.transposed:
            factor: Tensor = self.magnitude[start:stop] / torch.linalg.vector_norm(changed, dim=1)
            return changed * factor[:, None]
        if self._norms is None:
            self._norms = self._column_norms(before, size)
        return changed * (self.magnitude / self._norms)

    def _summed(self, before: Rows, start: int, stop: int, size: int) -> Tensor:
        changed = before(start, stop) + self.scaling * self._product(self.a, self.b, start, stop)
        if self.begins != "zero":
            if self._begin is None:
                self._begin = self._beginning(before(0, size))
            changed -= self._product(*self._begin, start, stop)
        return changed

    def _product(self, a: Tensor, b: Tensor, start: int, stop: int) -> Tensor:
        return a.T[start:stop] @ b.T if self.transposed else b[start:stop] @ a

    def _column_norms(self, before: Rows, size: int) -> Tensor:
        squares = torch.zeros(self.shape[1], dtype=torch.float64)
        for start in range(0, size, SLAB):
            rows = self._summed(before, start, min(start + SLAB, size), size)
            squares += rows.double().square().sum(0)
        return squares.sqrt().float()

    def _beginning(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (a, b) of what PEFT takes out of the base; `scaling` is in them."""
        rank = self.a.shape[0]
        matrix = weight.T if self.transposed else weight  # [out, in]
        if self.begins == "pissa":
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            return vh[:rank].clone(), u[:, :rank] * s[:rank]
        q, r = torch.linalg.qr(matrix)
        return self.scaling * r[:rank], q[:, :rank].clone()


@dataclass(eq=False)
class Added(Change):
    """A bias with another one added: PEFT's `lora_bias`."""

    value: Tensor

    def rows(self, before: Rows, start: int, stop: int, size: int) -> Tensor:
        return before(start, stop) + self.value[start:stop]


@dataclass(eq=False)
class Replaced(Change):
    """A table with some rows replaced: PEFT's `trainable_token_indices`.

    Attributes:
        indices: of the rows, in the order of `values`.
        values: [n, dim].
    """

    indices: tuple[int, ...]
    values: Tensor

    def rows(self, before: Rows, start: int, stop: int, size: int) -> Tensor:
        rows = before(start, stop)
        for index, value in zip(self.indices, self.values, strict=True):
            if start <= index < stop:
                rows[index - start] = value
        return rows


@dataclass(eq=False)
class FusedFactors:
    """scaling * B_e A_e of every expert e of a fused parameter: PEFT's `target_parameters`.

    Attributes:
        a, b: [experts * r, in] and [out, r * experts], float32, as PEFT stores them: in B the expert runs fastest.
        transposed: the parameter is [E, in, out], not [E, out, in].
    """

    a: Tensor
    b: Tensor
    scaling: float
    experts: int
    transposed: bool

    def delta(self, start: int, stop: int) -> Tensor:
        """Of the experts `start` to `stop`, in the parameter's own layout, float32."""
        a = self.a.reshape(self.experts, -1, self.a.shape[-1])[start:stop]  # [e, r, in]
        b = self.b.reshape(self.b.shape[0], -1, self.experts).permute(2, 0, 1)[start:stop]  # [e, out, r]
        delta = self.scaling * torch.bmm(b, a)
        return delta.transpose(1, 2) if self.transposed else delta


@dataclass(eq=False)
class OfExperts(Change):
    """A fused parameter that is stored fused: its rows are experts."""

    factors: FusedFactors

    def rows(self, before: Rows, start: int, stop: int, size: int) -> Tensor:
        return before(start, stop) + self.factors.delta(start, stop)


@dataclass(eq=False)
class OfPart(Change):
    """One matrix of a fused parameter that is stored as many; `part` gives its change, of the tensor's own shape."""

    part: Callable[[], Tensor]

    def rows(self, before: Rows, start: int, stop: int, size: int) -> Tensor:
        return before(start, stop) + self.part()[start:stop]


@dataclass(eq=False)
class OwnPart(Change):
    """One matrix of a fused parameter of the adapter's own, in the place of the base's."""

    part: Callable[[], Tensor]

    def rows(self, before: Rows, start: int, stop: int, size: int) -> Tensor:
        return self.part()[start:stop]
