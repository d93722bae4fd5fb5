"""A linear layer whose every row has its own expert: y_i = rho_i (W̄ x) + B_i (A_i x) + b_i.

`ExpertLinear` is what all such layers share. In `MixedLinear`, the plain one, the factors of all experts stand in two
tensors, A [sum of r, in] and B^T [sum of r, out], so that one expert's are a view, and a batch that mixes experts costs
two products however many they are: rows of one expert are brought together (`polymerge.model.shares`), times their A
and times their B, and taken back to where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .assignment import Assignment
from .numbered import Numbered
from .product import groups, product
from .residual import Term, add_entries, add_mixed, add_one, mixed_ratio
from .shares import Entries, Member, on_device

# Pairs of different ranks are filled with zeros to one rank where that takes at most this many times the memory.
MAX_PADDING = 1.25
# Rows times tokens, padding included, from which on one pair after the other costs less than the copies of all.
MAX_TOGETHER = 1024


class ExpertLinear(nn.Module):
    """Takes the place of an nn.Linear or a Conv1D. Inference only: writes in place where that saves a pass.

    Knows the base's product and the biases; how the residuals are held and added is a subclass's.

    Args:
        base: the base's weight, [out, in] as a view (a Conv1D's is transposed by the caller); or a module without bias
            that multiplies with it, whose own parameters nobody else reads.
        bias: the base's [out], or None.
        biases: for every expert its own bias [out], or None for the base's.
    """

    bias_table: Tensor | None
    inner: nn.Module | None
    alone = False  # nobody else has the base's weight
    averaged = False  # the average has a part of the experts' residuals

    def __init__(
        self, state: Assignment, base: Tensor | nn.Module, bias: Tensor | None, biases: Sequence[Tensor | None]
    ) -> None:
        super().__init__()
        self.state = state
        self.inner = base if isinstance(base, nn.Module) else None
        if isinstance(base, Tensor):
            # one that is another module's too stays one parameter
            self.alone = not isinstance(base, nn.Parameter)
            self.weight = base if isinstance(base, nn.Parameter) else nn.Parameter(base, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
        has_biases = any(value is not None for value in biases)
        table = (
            torch.stack([bias if v is None else v.to(bias) for v in (*biases, None)])
            if has_biases and bias is not None
            else None
        )
        self.register_buffer("bias_table", table, persistent=False)  # [N + 1, out]

    @property
    def takes_numbers(self) -> bool:
        """Whether it runs where only the assignment's `numbers` say which expert a row has (`Assignment.reading`)."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., in] -> [B, ..., out]"""
        alone = self.state.average_only and not self.averaged
        if alone and self.inner is None:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = F.linear(x, self.weight) if self.inner is None else self.inner(x)
        if not alone:
            self.add_residuals(x, y)
        if self.bias is not None:
            y += self._row_bias(y)
        return y

    def add_residuals(self, x: Tensor, y: Tensor) -> None:
        """Turns the base's output y [B, ..., out] into the experts', in place: rho y + B (A x)."""
        raise NotImplementedError

    def _row_bias(self, y: Tensor) -> Tensor:
        assert self.bias is not None
        table = self.bias_table
        if table is None:
            return self.bias

        def make() -> Tensor:
            return self.state.of_rows(mixed_rows(self.state, table), y.shape[0], y.dim())

        return self.state.once((id(self), "bias", y.shape[0], y.dim()), make)


class MixedLinear(ExpertLinear):
    """Holds the factors of all experts in the base's dtype. Arguments as ExpertLinear's, and:

    Args:
        factors: pairs (A [r, in], B [out, r]), or None; by default one for every expert.
        ratios: rho of every expert.
        shares: [N + 1, pairs], what every expert and the average has of each pair, as `Assignment.shares` takes it.

    Attributes:
        offsets: where the components of each pair begin, and the last one's end.
        places: of every pair among those that have components, or None.
        shape: (out, in).
        rank: of all pairs alike; 0 where they differ too much.
        input_of: as `Assignment.gathered` takes it.
    """

    stacked_a: Tensor
    stacked_b: Tensor

    def __init__(
        self,
        state: Assignment,
        base: Tensor | nn.Module,
        bias: Tensor | None,
        factors: Sequence[tuple[Tensor, Tensor] | None],
        ratios: Sequence[float],
        biases: Sequence[Tensor | None],
        shares: Tensor | None = None,
    ) -> None:
        super().__init__(state, base, bias, biases)
        self.shares = shares  # not a buffer, which would follow the model to another dtype
        self.averaged = shares is not None and bool(shares[-1].any())
        self.input_of: int | None = None
        self.shape = shape_of(base)
        held = next((factor[0] for factor in factors if factor), torch.empty(0, device=state.device))
        like = base if isinstance(base, Tensor) else held
        self._hold(like, factors)
        self.ratios = [*ratios, 1.0]
        self._table = torch.tensor(self.ratios)  # not a buffer, which would follow the model to another dtype
        self.scaled = any(ratio != 1.0 for ratio in ratios)
        self._numbered: Numbered | None = None
        self._alone = [shares is None or _has_one(shares[number].tolist(), number) for number in range(len(ratios))]

    def _hold(self, like: Tensor, factors: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        ranks = [factor[0].shape[0] if factor else 0 for factor in factors]
        held, highest = [n for n, rank in enumerate(ranks) if rank], max(ranks, default=0)
        self.rank = highest if highest * len(held) <= MAX_PADDING * sum(ranks) else 0
        wide = [self.rank if rank and self.rank else rank for rank in ranks]
        self.offsets = [0, *accumulate(wide)]
        self.places = tuple(held.index(n) if rank else None for n, rank in enumerate(ranks))
        self._owner = [n for n, rank in enumerate(wide) for _ in range(rank)]
        a = like.new_zeros(self.offsets[-1], self.shape[1])
        b = like.new_zeros(self.offsets[-1], self.shape[0])
        for n in held:
            factor, start = factors[n], self.offsets[n]
            assert factor is not None
            a[start : start + ranks[n]] = factor[0]
            b[start : start + ranks[n]] = factor[1].T
        self.register_buffer("stacked_a", a, persistent=False)
        self.register_buffer("stacked_b", b, persistent=False)

    @property
    def takes_numbers(self) -> bool:
        return self.shares is None

    def dense(self, weights: Sequence[float]) -> Tensor:
        """The whole matrix [out, in] of a row with these weights of the experts, the average's last."""
        ratio = sum(weight * rho for weight, rho in zip(weights, self.ratios, strict=True))
        of_pairs = weights if self.shares is None else (torch.tensor(weights) @ self.shares).tolist()
        base = ratio * self.weight.float()
        share = torch.tensor([of_pairs[n] for n in self._owner], device=base.device)
        return base.addmm_(self.stacked_b.float().T * share, self.stacked_a.float()).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., in] -> [B, ..., out]"""
        if self.state.fixed and self._factors().joins(self.state.rows):
            y = self._factors().product(x, self.state.numbers)
            return y if self.bias is None else y.add_(self._row_bias(y))
        return super().forward(x)

    def add_residuals(self, x: Tensor, y: Tensor) -> None:
        """A view of the factors for one expert; one product for A and one for B^T for any number of them. Which way it
        goes is decided once a batch."""
        if self.state.fixed:
            self._factors().add(y, x, self.state.numbers)
            return
        add = self.state.once((id(self), "way", x.shape[:-1]), lambda: self._way(x, y))
        add(x, y)

    def _factors(self) -> Numbered:
        """Made when it is first asked for, and anew where the factors were moved."""
        if self._numbered is None or self._numbered.a is not self.stacked_a:
            base = self.weight.data if self.inner is None and self.alone else None
            self._numbered = Numbered(self.stacked_a, self.stacked_b, self.offsets, self.ratios, base)
            self.stacked_a = self._numbered.a
            if base is not None and self._numbered.joined is not None:
                self.weight.data = self._numbered.joined[: len(base)]
        return self._numbered

    def _way(self, x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], None]:
        expert = self.state.single
        if expert is not None and self._alone[expert]:
            a, b = self._pair(expert)
            return partial(_add_one, a, b.T, self.ratios[expert])
        ratio, members = self._row_ratio(y), self.state.shares(self.shares).of(self.places)
        if members and self._is_dense(members):
            return partial(self._add_stacked, ratio, *self._stacked(x, members))
        if (entries := self._entries(x, members)) is not None:
            a, b = (f.view(-1, self.rank, f.shape[-1]) for f in (self.stacked_a, self.stacked_b))
            return partial(self._add_together, ratio, entries, a.transpose(1, 2), b)
        return partial(self._add_apart, ratio, members)

    def _add_stacked(self, ratio: Tensor | None, a: Tensor, b: Tensor, share: Tensor, x: Tensor, y: Tensor) -> None:
        add_mixed(y, ratio, [Term(x, a, b, share)])

    def _add_together(self, ratio: Tensor | None, entries: Entries, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> None:
        z = product(self.state.gathered(x, entries, self.input_of), a, entries)
        add_entries(y, ratio, z, b, entries)

    def _add_apart(self, ratio: Tensor | None, members: Sequence[Member], x: Tensor, y: Tensor) -> None:
        add_mixed(y, ratio, self._one_by_one(x, members))

    def _pair(self, number: int) -> tuple[Tensor, Tensor]:
        """A [r, in] and B^T [r, out]."""
        part = slice(self.offsets[number], self.offsets[number + 1])
        return self.stacked_a[part], self.stacked_b[part]

    def _is_dense(self, members: Sequence[Member]) -> bool:
        """Whether most rows have a part of most pairs."""
        span = members[-1].pair + 1 - members[0].pair
        return 2 * sum(len(member.rows) for member in members) >= span * self.state.rows

    def _entries(self, x: Tensor, members: Sequence[Member]) -> Entries | None:
        """The rows of x [size, ...] by pair; None where one pair after the other is better, or there is none."""
        if not members or not self.rank:
            return None
        shares, repeats = self.state.shares(self.shares), self.state.repeats(x.shape[0])
        if groups(x, *self.shape):
            return shares.entries(self.places, repeats, padded=False)
        tokens = len(members) * max(len(member.rows) for member in members) * repeats * x.shape[1:-1].numel()
        return shares.entries(self.places, repeats, padded=True) if tokens <= MAX_TOGETHER else None

    def _stacked(self, x: Tensor, members: Sequence[Member]) -> tuple[Tensor, Tensor, Tensor]:
        """A [ranks, in], B [out, ranks] and what every row has of each component: every row times all factors."""
        lo, hi = self.offsets[members[0].pair], self.offsets[members[-1].pair + 1]

        def make() -> Tensor:
            table = self.state.shares(self.shares).table[:, self._owner[lo:hi]]  # [B, sum of ranks]
            return self.state.of_rows(on_device(table, x.device), x.shape[0], x.dim())

        share = self.state.once((tuple(self.offsets), id(self.shares), lo, hi, x.shape[0], x.dim()), make)
        return self.stacked_a[lo:hi], self.stacked_b[lo:hi].T, share

    def _one_by_one(self, x: Tensor, members: Sequence[Member]) -> Iterator[Term]:
        for pair, rows, share in self._rows_of(x.shape[0], members):
            a, b = self._pair(pair)
            yield Term(x[rows], a, b.T, share.view(-1, *[1] * (x.dim() - 1)), rows)

    def _rows_of(self, size: int, members: Sequence[Member]) -> list[tuple[int, Tensor, Tensor]]:
        """(pair, entries of a first dimension of `size` that have a part of it, its share in each)"""
        repeats, state = self.state.repeats(size), self.state

        def make() -> list[tuple[int, Tensor, Tensor]]:
            each = torch.arange(repeats)
            rows = [(torch.tensor(m.rows)[:, None] * repeats + each).flatten() for m in members]
            parts = [torch.tensor(m.parts).repeat_interleave(repeats) for m in members]
            device = self.stacked_a.device
            return [
                (m.pair, on_device(r, device), on_device(p, device))
                for m, r, p in zip(members, rows, parts, strict=True)
            ]

        return state.once(("rows of", self.places, id(self.shares), repeats), make)

    def _row_ratio(self, y: Tensor) -> Tensor | None:
        """rho of every row, float32 [B, ..., 1]; None where it is 1 for all experts."""
        if not self.scaled:
            return None

        def make() -> Tensor:
            rows = on_device(mixed_ratio(self.state.table, self._table), y.device)  # [B, 1]
            return self.state.of_rows(rows, y.shape[0], y.dim())

        return self.state.once((id(self), "ratio", y.shape[0], y.dim()), make)


def shape_of(base: Tensor | nn.Module) -> tuple[int, int]:
    """(out, in)"""
    if isinstance(base, Tensor):
        return base.shape[0], base.shape[1]
    sizes: Any = base
    return int(sizes.out_features), int(sizes.in_features)


def _add_one(a: Tensor, b: Tensor, ratio: float, x: Tensor, y: Tensor) -> None:
    add_one(y, x, a, b, ratio)


def mixed_rows(state: Assignment, table: Tensor) -> Tensor:
    """Rows of a table [N + 1, K] mixed by the assignment: [B, K]. A row with one expert is that row, to the bit."""
    picked = table.index_select(0, state.numbers)
    if state.pure is None:
        return picked
    mixed = (state.weights @ table.float()).to(table.dtype)
    return torch.where(state.pure, picked, mixed)


def _has_one(shares: Sequence[float], number: int) -> bool:
    """Whether an expert has the pair of its own number, whole, and nothing else."""
    return all(share == float(pair == number) for pair, share in enumerate(shares))
