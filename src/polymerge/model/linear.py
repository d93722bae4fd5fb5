"""A linear layer whose every row has its own expert: y_i = rho_i (W̄ x) + B_i (A_i x) + b_i.

`ExpertLinear` is what all such layers share. In `MixedLinear`, the plain one, the factors of all experts stand in two
matrices, A [sum of r, in] and B [out, sum of r], so that one expert's are a view and a mixed batch costs two products:
z = x A^T, masked by each row's weights, and z B^T added onto the base's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .assignment import Assignment
from .residual import Term, add_mixed, add_one, mixed_ratio

# With more experts than this in one batch, computing every row against all factors costs more than going through the
# experts one after the other.
MAX_STACKED = 8


class ExpertLinear(nn.Module):
    """Takes the place of an nn.Linear or a Conv1D. Inference only: writes in place where that saves a pass.

    Knows the base's product and the biases; how the residuals are held and added is a subclass's.

    Args:
        weight: the base's, [out, in] as a view (a Conv1D's is transposed by the caller).
        bias: the base's [out], or None.
        biases: for every expert its own bias [out], or None for the base's.
    """

    bias_table: Tensor | None
    averaged = False  # the average has a part of the experts' residuals

    def __init__(self, state: Assignment, weight: Tensor, bias: Tensor | None, biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.state = state
        # one that is another module's too stays one parameter
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
        has_biases = any(value is not None for value in biases)
        table = (
            torch.stack([bias if v is None else v.to(bias) for v in (*biases, None)])
            if has_biases and bias is not None
            else None
        )
        self.register_buffer("bias_table", table, persistent=False)  # [N + 1, out]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., in] -> [B, ..., out]"""
        if self.state.average_only and not self.averaged:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x, self.weight)
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
    """

    stacked_a: Tensor
    stacked_b: Tensor

    def __init__(
        self,
        state: Assignment,
        weight: Tensor,
        bias: Tensor | None,
        factors: Sequence[tuple[Tensor, Tensor] | None],
        ratios: Sequence[float],
        biases: Sequence[Tensor | None],
        shares: Tensor | None = None,
    ) -> None:
        super().__init__(state, weight, bias, biases)
        self.shares = shares  # not a buffer, which would follow the model to another dtype
        self.averaged = shares is not None and bool(shares[-1].any())
        out_features, in_features = weight.shape
        ranks = [factor[0].shape[0] if factor else 0 for factor in factors]
        self.offsets = [sum(ranks[:n]) for n in range(len(ranks) + 1)]
        a = weight.new_zeros(self.offsets[-1], in_features)
        b = weight.new_zeros(out_features, self.offsets[-1])
        for n, factor in enumerate(factors):
            if factor:
                a[self.offsets[n] : self.offsets[n + 1]] = factor[0]
                b[:, self.offsets[n] : self.offsets[n + 1]] = factor[1]
        self.register_buffer("stacked_a", a, persistent=False)
        self.register_buffer("stacked_b", b, persistent=False)
        self.ratios = [*ratios, 1.0]
        self._table = torch.tensor(self.ratios)  # not a buffer, which would follow the model to another dtype
        self.scaled = any(ratio != 1.0 for ratio in ratios)
        self.ranks_key = tuple(ranks)

    def dense(self, weights: Sequence[float]) -> Tensor:
        """The whole matrix [out, in] of a row with these weights of the experts, the average's last."""
        ratio = sum(weight * rho for weight, rho in zip(weights, self.ratios, strict=True))
        of_pairs = weights if self.shares is None else (torch.tensor(weights) @ self.shares).tolist()
        share = [weight for weight, rank in zip(of_pairs, self.ranks_key, strict=False) for _ in range(rank)]
        base = ratio * self.weight.float()
        b = self.stacked_b.float() * torch.tensor(share, device=base.device)
        return base.addmm_(b, self.stacked_a.float()).to(self.weight.dtype)

    def add_residuals(self, x: Tensor, y: Tensor) -> None:
        """Two products for one expert or a few; one expert after the other for many."""
        expert = self.state.single
        if expert is not None and self._has_one(expert):
            lo, hi = self.offsets[expert], self.offsets[expert + 1]
            add_one(y, x, self.stacked_a[lo:hi], self.stacked_b[:, lo:hi], self.ratios[expert])
        else:
            _, first, last = self.state.shares(self.shares)
            many = last - first > MAX_STACKED
            add_mixed(y, self._row_ratio(y), self._one_by_one(x) if many else self._stacked(x))

    def _has_one(self, expert: int) -> bool:
        """Whether an expert has the pair of its own number, whole, and nothing else."""
        if self.shares is None:
            return True
        row = self.shares[expert]
        return bool(row[expert] == 1.0) and int(row.count_nonzero()) == 1

    def _stacked(self, x: Tensor) -> Iterator[Term]:
        _, first, last = self.state.shares(self.shares)
        lo, hi = self.offsets[first], self.offsets[last]
        if lo < hi:
            share = self._row_mask(x, lo, hi)  # [B, ..., sum of ranks]
            yield Term(x, self.stacked_a[lo:hi], self.stacked_b[:, lo:hi], share)

    def _one_by_one(self, x: Tensor) -> Iterator[Term]:
        for n, rows, share in self._members(x.shape[0]):
            lo, hi = self.offsets[n], self.offsets[n + 1]
            share = share.view(-1, *[1] * (x.dim() - 1))
            yield Term(x[rows], self.stacked_a[lo:hi], self.stacked_b[:, lo:hi], share, rows)

    def _members(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(pair of factors, entries of a first dimension of `size` that have a part of it, its share in each)"""
        state = self.state
        repeats = state.repeats(size)
        shares, first, last = state.shares(self.shares)
        for n in range(first, last):
            rows = shares[:, n].nonzero().squeeze(1)
            if self.offsets[n] == self.offsets[n + 1] or not len(rows):
                continue
            share = shares[rows, n]
            if repeats > 1:
                rows = (rows[:, None] * repeats + torch.arange(repeats, device=rows.device)).flatten()
                share = share.repeat_interleave(repeats)
            yield n, rows, share

    def _row_ratio(self, y: Tensor) -> Tensor | None:
        """rho of every row, float32 [B, ..., 1]; None where it is 1 for all experts."""
        if not self.scaled:
            return None

        def make() -> Tensor:
            self._table = self._table.to(y.device)
            rows = mixed_ratio(self.state.weights, self._table)  # [B, 1]
            return self.state.of_rows(rows, y.shape[0], y.dim())

        return self.state.once((id(self), "ratio", y.shape[0], y.dim()), make)

    def _row_mask(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Every factor's weight in every row, float32; shared by all layers with the same ranks."""

        def make() -> Tensor:
            owner = [n for n, rank in enumerate(self.ranks_key) for _ in range(rank)][lo:hi]
            mask = self.state.shares(self.shares)[0][:, owner]  # [B, sum of ranks]
            return self.state.of_rows(mask, x.shape[0], x.dim())

        return self.state.once((self.ranks_key, id(self.shares), lo, hi, x.shape[0], x.dim()), make)


def mixed_rows(state: Assignment, table: Tensor) -> Tensor:
    """Rows of a table [N + 1, K] mixed by the assignment: [B, K]. A row with one expert is that row, to the bit."""
    numbers = state.weights.argmax(dim=1)
    picked = table[numbers]
    if bool((state.weights.amax(dim=1) == 1.0).all()):
        return picked
    mixed = (state.weights @ table.float()).to(table.dtype)
    one = (state.weights.amax(dim=1) == 1.0)[:, None]
    return torch.where(one, picked, mixed)
