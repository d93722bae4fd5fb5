"""Which expert speaks for which row of a batch: the one piece of state that all mixed layers read.

An assignment is set before a forward pass and holds for all layers. Knows rows and weights; does not know layers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ModelError

# What a caller may say for one row: a name, a weighted mixture, or the average.
RowExpert = str | Mapping[str, float] | None
Experts = RowExpert | Sequence[RowExpert]
T = TypeVar("T")


class Assignment:
    """Rows of the current batch and the weight of every expert in each.

    Attributes:
        names: all experts of the model, in order.
        weights: [B, N + 1], float32 on the device; every row sums to 1. The last column is the average's.
        rows: B; 1 where a group of rows runs alone, however many they are.
        single: the expert that all rows share (its number), or None. `average_only` says that all rows are the average.
        groups: the distinct rows of `weights`: (weights as a tuple, numbers of the rows).
        beams: entries that the model's batch has for every row.
    """

    beams = 1

    rows: int
    weights: Tensor
    groups: list[tuple[tuple[float, ...], Tensor]]
    average_only: bool
    single: int | None
    first: int
    last: int

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self.device = device
        self.set(None, 1)

    def set(self, experts: Experts, rows: int) -> None:
        """Takes a caller's `experts` for a batch of `rows` rows.

        Raises:
            ModelError: an unknown name, a mixture without a positive weight, or a list of the wrong length.
        """
        per_row = [experts] * rows if experts is None or isinstance(experts, str | Mapping) else list(experts)
        if len(per_row) != rows:
            raise ModelError(f"experts: got {len(per_row)} entries for a batch of {rows} rows")
        self._take([self._row(entry) for entry in per_row])

    @contextmanager
    def narrowed(self, group: int) -> Iterator[None]:
        """Inside, all rows are of that group: for a layer that is run once for every group."""
        weights = self.groups[group][0]
        outer = dict(vars(self))
        kept = self.once(("narrowed", group), dict[str, Any])
        if kept:
            vars(self).update(kept)
        else:
            self._take([weights])
            kept.update({name: vars(self)[name] for name in vars(self) if name not in ("names", "device", "beams")})
        try:
            yield
        finally:
            vars(self).update(outer)

    def _take(self, table: Sequence[tuple[float, ...]]) -> None:
        distinct: dict[tuple[float, ...], list[int]] = {}
        for number, row in enumerate(table):
            distinct.setdefault(row, []).append(number)
        average = (*[0.0] * len(self.names), 1.0)
        self.rows = len(table)
        self.weights = torch.tensor(table, dtype=torch.float32, device=self.device)
        self.groups = [(key, torch.tensor(numbers, device=self.device)) for key, numbers in distinct.items()]
        self.average_only = list(distinct) == [average]
        only = next(iter(distinct))
        self.single = only.index(1.0) if len(distinct) == 1 and 1.0 in only and not self.average_only else None
        active = [n for n in range(len(self.names)) if any(row[n] for row in distinct)]
        self.first, self.last = (min(active), max(active) + 1) if active else (0, 0)
        self._kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made when it is first asked for after a `set` and remembered until the next."""
        if key not in self._kept:
            self._kept[key] = make()
        value: T = self._kept[key]
        return value

    def shares(self, table: Tensor | None) -> tuple[Tensor, int, int]:
        """What every row has of K pairs of factors.

        Args:
            table: [N + 1, K] float32 on the CPU, what every expert, and the average, has of each; it must live as long
                as the assignment. None: every expert has one of its own, and the average none.

        Returns:
            [B, K] float32; and the first pair, and the last + 1, of which any row has something.
        """
        if table is None:
            return self.weights[:, :-1], self.first, self.last

        def make() -> tuple[Tensor, int, int]:
            # Not a product of matrices, which a GPU may be told to compute with fewer digits.
            mixed = (self.weights[:, :, None] * table.to(self.device)).sum(dim=1)
            used = mixed.any(dim=0).nonzero().flatten().tolist()
            return mixed, min(used, default=0), max(used, default=-1) + 1

        return self.once(("shares", id(table)), make)

    def repeats(self, size: int) -> int:
        """How many consecutive entries of a first dimension of `size` belong to one row.

        1 for a batch; more for beams, and for tokens that a layer has flattened into the first dimension.
        """
        if size % self.rows:
            raise ModelError(f"a layer got {size} rows for a batch of {self.rows}; experts cannot be told apart")
        return size // self.rows

    def of_rows(self, values: Tensor, size: int, dim: int) -> Tensor:
        """Per-row values [B, K] in the form that multiplies a layer's tensor [size, ..., K] with `dim` dimensions.

        Returns:
            [size, ..., K], or [1, ..., K] for a group that runs alone.
        """
        repeats = self.repeats(size)
        if self.rows == 1:
            return values.view(1, *[1] * (dim - 2), values.shape[-1])
        if repeats > 1:
            values = values.repeat_interleave(repeats, dim=0)
        return values.view(size, *[1] * (dim - 2), values.shape[-1])

    def _row(self, entry: RowExpert) -> tuple[float, ...]:
        row = [0.0] * (len(self.names) + 1)
        if entry is None or entry == "average":
            row[-1] = 1.0
        elif isinstance(entry, str):
            row[self._number(entry)] = 1.0
        elif isinstance(entry, Mapping):
            total = sum(entry.values())
            if not (math.isfinite(total) and total > 0 and all(weight >= 0 for weight in entry.values())):
                raise ModelError(f"experts: mixture {dict(entry)} needs finite weights of at least 0 and one over 0")
            for name, weight in entry.items():
                row[-1 if name == "average" else self._number(name)] += weight / total
        else:
            raise ModelError(f"experts: {entry!r} is neither a name, a mixture (name: weight) nor None")
        return tuple(row)

    def _number(self, name: str) -> int:
        if name in self.names:
            return self.names.index(name)
        near = difflib.get_close_matches(name, self.names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"no expert {name!r} among {', '.join(self.names)}{hint}")
