"""Which expert speaks for which row of a batch: the one piece of state that all mixed layers read.

An assignment is set before a forward pass and holds for all layers. Knows rows and weights; does not know layers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ModelError
from .product import together
from .shares import Entries, Shares, on_device

# What a caller may say for one row: a name, a weighted mixture, or the average.
RowExpert = str | Mapping[str, float] | None
Experts = RowExpert | Sequence[RowExpert]
T = TypeVar("T")


def entries_of(experts: Experts, rows: int) -> list[RowExpert]:
    """What a caller says for each row of a batch. Raises ModelError for a list of the wrong length, or no list."""
    if experts is None or isinstance(experts, str | Mapping):
        return [experts] * rows
    if isinstance(experts, set | frozenset | bytes) or not isinstance(experts, Iterable):  # a set has no order
        kind = type(experts).__name__
        raise ModelError(f"experts: a {kind} does not say whose each row is; give a name, a mixture, or a list")
    per_row = list(experts)
    if len(per_row) != rows:
        raise ModelError(f"experts: got {len(per_row)} entries for a batch of {rows} rows")
    return per_row


class Assignment:
    """Rows of the current batch and the weight of every expert in each.

    Attributes:
        names: all experts of the model, in order.
        table: [B, N + 1], float32 on the CPU; every row sums to 1. The last column is the average's.
        weights: the same on the device.
        numbers: [B], the column of every row's largest weight.
        pure: [B, 1], whether that is 1; None where it is in all rows.
        rows: B; 1 where a group of rows runs alone, however many they are.
        single: the expert that all rows share (its number), or None. `average_only` says that all rows are the average.
        groups: the distinct rows of `weights`: (weights as a tuple, numbers of the rows).
        beams: entries that the model's batch has for every row.
        fixed: every row has one expert, and only `numbers`, on the device, says which.
    """

    beams = 1

    rows: int
    table: Tensor
    weights: Tensor
    numbers: Tensor
    pure: Tensor | None
    groups: list[tuple[tuple[float, ...], Tensor]]
    fixed: bool
    average_only: bool
    single: int | None
    first: int
    last: int

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self.device = device
        self.fixed = False
        self.set(None, 1)

    def set(self, experts: Experts, rows: int) -> None:
        """Takes a caller's `experts` for a batch of `rows` rows.

        Raises:
            ModelError: an unknown name, a mixture without a positive weight, or a list of the wrong length.
        """
        self._take([self._row(entry) for entry in entries_of(experts, rows)])

    def check(self, entry: RowExpert) -> None:
        """Raises ModelError as `set` does, and changes nothing."""
        self._row(entry)

    @contextmanager
    def narrowed(self, weights: tuple[float, ...]) -> Iterator[None]:
        """Inside, all rows have these weights, the average's last: for a layer that is run once for every group."""
        outer = dict(vars(self))
        vars(self)["fixed"] = False
        kept = self.once(("narrowed", weights), dict[str, Any])
        if kept:
            vars(self).update(kept)
        else:
            self._take([weights])
            kept.update({name: vars(self)[name] for name in vars(self) if name not in ("names", "device", "beams")})
        try:
            yield
        finally:
            vars(self).update(outer)

    @contextmanager
    def reading(self, numbers: Tensor, constants: dict[Hashable, Any]) -> Iterator[None]:
        """Inside, every row has one expert or the average, whose number stands in a tensor on the device and may change
        from one pass to the next. Only layers that look at nothing else can run (`polymerge.model.step`).

        Args:
            numbers: [B] int64.
            constants: what does not depend on the numbers; it is kept from pass to pass.
        """
        outer = dict(vars(self))
        vars(self).update(
            rows=len(numbers), numbers=numbers, fixed=True, pure=None, average_only=False, single=None, groups=[],
            _kept=dict(constants), _last=None,
        )  # fmt: skip
        try:
            yield
            constants.update({key: value for key, value in self._kept.items() if _is_narrowed(key)})
        finally:
            vars(self).update(outer)

    @property
    def columns(self) -> list[tuple[tuple[float, ...], Tensor, Tensor]]:
        """For every expert, and the average, of which any row has a part: (the weights of a row that is all its, the
        rows, its part in each)."""

        def make() -> list[tuple[tuple[float, ...], Tensor, Tensor]]:
            count, members = len(self.names) + 1, Shares(self.table, self.device).members
            return [
                (
                    tuple(float(n == m.pair) for n in range(count)),
                    on_device(torch.tensor(m.rows), self.device),
                    on_device(torch.tensor(m.parts), self.device),
                )
                for m in members
            ]

        return self.once("columns", make)

    def _take(self, table: Sequence[tuple[float, ...]]) -> None:
        distinct: dict[tuple[float, ...], list[int]] = {}
        for number, row in enumerate(table):
            distinct.setdefault(row, []).append(number)
        average = (*[0.0] * len(self.names), 1.0)
        self.rows = len(table)
        self.table = torch.tensor(table, dtype=torch.float32)
        largest, numbers = self.table.max(dim=1, keepdim=True)
        self.weights, self.numbers = on_device(self.table, self.device), on_device(numbers[:, 0], self.device)
        mixed = any(1.0 not in row for row in distinct)
        self.pure = on_device(largest == 1.0, self.device) if mixed else None
        self.groups = [(key, on_device(torch.tensor(rows), self.device)) for key, rows in distinct.items()]
        self.average_only = list(distinct) == [average]
        only = next(iter(distinct))
        self.single = only.index(1.0) if len(distinct) == 1 and 1.0 in only and not self.average_only else None
        active = [n for n in range(len(self.names)) if any(row[n] for row in distinct)]
        self.first, self.last = (min(active), max(active) + 1) if active else (0, 0)
        self._kept: dict[Hashable, Any] = {}
        self._last: tuple[Tensor, Entries, int, Tensor] | None = None

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made when it is first asked for after a `set` and remembered until the next."""
        if key not in self._kept:
            self._kept[key] = make()
        value: T = self._kept[key]
        return value

    def shares(self, table: Tensor | None) -> Shares:
        """What every row has of K pairs of factors.

        Args:
            table: [N + 1, K] float32 on the CPU, what every expert, and the average, has of each; it must live as long
                as the assignment. None: every expert has one of its own, and the average none.
        """

        def make() -> Shares:
            mixed = self.table[:, :-1] if table is None else (self.table[:, :, None] * table).sum(dim=1)
            return Shares(mixed, self.device)

        return self.once(("shares", id(table) if table is not None else None), make)

    def gathered(self, x: Tensor, entries: Entries, input_of: int | None) -> Tensor:
        """The entries' rows of a layer's input x [rows, ...], as `product` takes them.

        Args:
            input_of: layers with the same number, one after the other, were seen to read the same numbers: where one is
                given the very tensor that another was, it is given what that one made.
        """
        last = self._last
        if input_of is not None and last and last[0] is x and last[1] is entries and last[2] == input_of:
            return last[3]
        rows = together(x.index_select(0, entries.rows), entries)
        self._last = (x, entries, input_of, rows) if input_of is not None else None
        return rows

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
            weights = _numbers(entry.values())
            total = sum(weights)
            if not (math.isfinite(total) and total > 0 and min(weights) >= 0):
                raise ModelError(f"experts: mixture {dict(entry)} needs finite weights of at least 0 and one over 0")
            for name, weight in zip(entry, weights, strict=True):
                row[-1 if name in (None, "average") else self._number(name)] += weight / total
        else:
            raise ModelError(f"experts: {entry!r} is neither a name, a mixture (name: weight) nor None")
        return tuple(row)

    def _number(self, name: str) -> int:
        if name in self.names:
            return self.names.index(name)
        near = difflib.get_close_matches(str(name), self.names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"no expert {name!r} among {', '.join(self.names)}{hint}")


def _is_narrowed(key: Hashable) -> bool:
    return isinstance(key, tuple) and key[0] == "narrowed"


def _numbers(weights: Iterable[Any]) -> list[float]:
    """Not a number where one is none."""
    try:
        return [float(weight) for weight in weights]
    except (TypeError, ValueError):
        return [math.nan]
