"""A table with a row a token whose every row of a batch has its own expert: rho_i W̄[ids] + B_i[ids] A_i looked up, and
rho_i (W̄ x) + B_i (A_i x) where it is the head.

One `MixedTable` holds the average's table and the factors of all experts, once for an embedding and the head that is
tied to it. No expert's table is ever made whole. `MixedEmbedding` takes the place of a lookup's forward and `MixedHead`
of the head. Knows one table; which modules look up and which multiply is `polymerge.model.placing`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .assignment import Assignment
from .linear import ExpertLinear, MixedLinear
from .own import take_forward
from .product import together
from .residual import Term, add_entries, add_mixed
from .rows import expanded
from .shares import Member


class OwnRows(NamedTuple):
    """Rows of the table that stand for another token in an expert's.

    Attributes:
        numbers: in order, int64 [n].
        values: [n, H].
    """

    numbers: Tensor
    values: Tensor


class MixedTable(MixedLinear):
    """W̄ [V, H] with the factors B_i [V, r] and A_i [r, H] of all experts. Arguments as MixedLinear's, no biases, and:

    Args:
        own: every expert's own rows, or None. Experts that have some are in no mixture.
    """

    def __init__(
        self,
        state: Assignment,
        weight: nn.Parameter,
        factors: Sequence[tuple[Tensor, Tensor] | None],
        ratios: Sequence[float],
        own: Sequence[OwnRows | None],
        shares: Tensor | None = None,
    ) -> None:
        super().__init__(state, weight, None, factors, ratios, [None] * len(ratios), shares)
        self.own = {number: rows for number, rows in enumerate(own) if rows is not None}

    def _apply(self, fn: Any, recurse: bool = True) -> MixedTable:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        values = {number: fn(rows.values) for number, rows in self.own.items()}
        self.own = {n: OwnRows(self.own[n].numbers.to(moved.device), moved) for n, moved in values.items()}
        return self

    @property
    def takes_numbers(self) -> bool:
        return super().takes_numbers and not self.own

    def rows(self, ids: Tensor) -> Tensor:
        """ids [B, ...] -> every row's expert's rows of the table, [B, ..., H]."""
        y = F.embedding(ids, self.weight)
        if self.state.fixed:
            self._factors().look_up(y, ids, self.state.numbers)
            return y
        self._add_looked_up(ids, y)
        for place, rows in self._with_own(ids.shape[0]):
            said = ids if place is None else ids[place]
            numbers = torch.searchsorted(rows.numbers, said.contiguous()).clamp(max=len(rows.numbers) - 1)
            is_own = rows.numbers[numbers] == said
            looked_up = torch.where(is_own[..., None], rows.values[numbers], y if place is None else y[place])
            if place is None:
                y = looked_up
            else:
                y[place] = looked_up
        return y

    def add_residuals(self, x: Tensor, y: Tensor) -> None:
        super().add_residuals(x, y)
        for place, rows in self._with_own(x.shape[0]) if self.own else ():
            if place is None:
                y[..., rows.numbers] = F.linear(x, rows.values)
            else:
                part = y[place]
                part[..., rows.numbers] = F.linear(x[place], rows.values)
                y[place] = part

    def dense(self, weights: Sequence[float]) -> Tensor:
        """As MixedLinear's, with the rows that are an expert's own."""
        table = super().dense(weights)
        rows = self.own.get(list(weights).index(1.0)) if 1.0 in weights else None
        if rows is not None:
            table[rows.numbers] = rows.values
        return table

    def _add_looked_up(self, ids: Tensor, y: Tensor) -> None:
        members, ratio = self.state.shares(self.shares).of(self.places), self._row_ratio(y)
        entries = self._entries(y, members)
        if entries is None:
            add_mixed(y, ratio, self._looked_up(ids, members))
            return
        b = self.stacked_b.view(-1, self.rank, len(self.weight))
        slots = entries.slots.view(-1, *[1] * (ids.dim() - 1))
        z = b.transpose(1, 2)[slots, ids.index_select(0, entries.rows)]  # [M, ..., r]
        z = together(z, entries)
        add_entries(y, ratio, z, self.stacked_a.view(-1, self.rank, y.shape[-1]), entries)

    def _looked_up(self, ids: Tensor, members: Sequence[Member]) -> Iterator[Term]:
        for pair, rows, share in self._rows_of(ids.shape[0], members):
            a, b = self._pair(pair)
            looked_up = b.T[ids[rows]]  # [n, ..., r]
            yield Term(looked_up, None, a.T, share.view(-1, *[1] * (looked_up.dim() - 1)), rows)

    def _with_own(self, size: int) -> Iterator[tuple[Tensor | None, OwnRows]]:
        """(entries of a first dimension, or None for all; their expert's own rows)"""
        state = self.state
        for weights, rows in state.groups if self.own else ():
            own = self.own.get(weights.index(1.0)) if 1.0 in weights else None
            if own is not None:
                yield (None if len(state.groups) == 1 else expanded(rows, state.repeats(size))), own


class MixedHead(ExpertLinear):
    """The output head that a table is."""

    def __init__(self, table: MixedTable, bias: Tensor | None, biases: Sequence[Tensor | None]) -> None:
        super().__init__(table.state, table.weight, bias, biases)
        self.table = table

    @property
    def takes_numbers(self) -> bool:
        return self.table.takes_numbers

    def add_residuals(self, x: Tensor, y: Tensor) -> None:
        self.table.add_residuals(x, y)


class MixedEmbedding(nn.Module):
    """Takes the place of the forward of a module that looks rows up. Whatever else it does with them (scale, project)
    it does: it is given a table of the rows that were asked for, each its expert's, and their numbers in the place of
    the ids.

    Args:
        inner: stays the caller's; it is no part of this one.
    """

    inner: Any

    def __init__(self, state: Assignment, inner: nn.Module, table: MixedTable) -> None:
        super().__init__()
        self.state, self.table = state, table
        self.__dict__["inner"], self._forward = inner, inner.forward
        take_forward(inner, self.forward)

    @property
    def takes_numbers(self) -> bool:
        """As ExpertLinear's."""
        return self.table.takes_numbers

    @staticmethod
    def fits(inner: Any) -> bool:
        """Tries whether a module gives what it gives from a table of the rows that it is asked for."""
        if [name for name, _ in inner.named_parameters(recurse=False)] != ["weight"] or inner.weight.dim() != 2:
            return False
        count, padding = len(inner.weight), getattr(inner, "padding_idx", None)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(count, (2, 4), generator=generator)
        ids[0, :3] = torch.tensor([0, count - 1, padding if isinstance(padding, int) else 0])
        ids = ids.to(inner.weight.device)
        try:
            with torch.no_grad():
                expected, got = inner(ids), _with_rows(inner, inner.forward, F.embedding(ids, inner.weight))
        except Exception:  # it wants something else
            return False
        return isinstance(got, Tensor) and isinstance(expected, Tensor) and torch.equal(got, expected)

    def forward(self, ids: Tensor) -> Any:
        """ids [B, ...], or [1, ...] for all rows"""
        state = self.state
        if state.average_only:
            return self._forward(ids)
        if not ids.dim():
            return self.forward(ids[None])[0]
        if ids.shape[0] == 1 and state.rows > 1:
            ids = ids.expand(state.rows * state.beams, *ids.shape[1:])
        return _with_rows(self.inner, self._forward, self.table.rows(ids))


def _with_rows(inner: Any, forward: Any, rows: Tensor) -> Any:
    """What a lookup's forward gives for rows of its table [..., H]."""
    table = rows.reshape(-1, rows.shape[-1])
    numbers = torch.arange(len(table), device=rows.device).view(rows.shape[:-1])
    # An instance attribute is found before nn.Module looks among its parameters. Which row is padding counts in
    # training alone, and there may be fewer rows than that one's number.
    before = {"padding_idx": inner.padding_idx} if hasattr(inner, "padding_idx") else {}
    inner.__dict__ |= {"weight": table, **dict.fromkeys(before)}
    try:
        return forward(numbers)
    finally:
        del inner.__dict__["weight"]
        inner.__dict__ |= before
