"""Mixture-of-experts blocks whose matrices transformers holds fused: every matrix of it has its own residuals.

(An "expert" of such a block is a part of one model's layer. Here it is called a block expert; an expert is a
fine-tuned model, as everywhere else.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sources.forms import Part
from .assignment import Assignment
from .own import OwnTensor, Weights
from .residual import Term, add_mixed, mixed_ratio


@dataclass
class SlabResidual:
    """What the experts have beyond the base in one matrix of a fused parameter.

    Attributes:
        rows: which rows of the block expert's slab the matrix is.
        factors: for every expert (A [r, in], B [out, r]) or None.
        ratios: rho of every expert.
        matrices: for every expert its own whole matrix, or None.
        shares: what every expert and the average has of each pair of factors, as `Assignment.shares` takes it.
        scales: [N + 1] float32, what the base counts for in every expert and in the average: rho, or 0 beside a whole
            matrix.
    """

    rows: slice
    factors: list[tuple[Tensor, Tensor] | None]
    ratios: list[float]
    matrices: list[Tensor | None] = field(default_factory=list)
    shares: Tensor | None = None
    scales: Tensor = field(init=False)

    def __post_init__(self) -> None:
        whole = [value is not None for value in self.matrices] or [False] * len(self.ratios)
        self.scales = torch.tensor([*(0.0 if w else r for w, r in zip(whole, self.ratios, strict=True)), 1.0])

    def terms(self, x: Tensor, rows: Tensor, experts: Iterable[int]) -> Iterator[Term]:
        """What these experts have beyond the base, for tokens x [t, in] with their weights in each, rows [t, N + 1]."""
        if self.shares is not None:
            rows = (rows[:, :, None] * self.shares.to(rows)).sum(dim=1)
            experts = range(len(self.factors))
        for n in experts:
            factor, matrix = self.factors[n], self.matrices[n] if self.matrices else None
            share = rows[:, n : n + 1]
            if matrix is not None:
                yield Term(x, None, matrix, share)
            elif factor:
                yield Term(x, *factor, share)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """To another device or dtype."""
        self.factors = [(fn(factor[0]), fn(factor[1])) if factor else None for factor in self.factors]
        self.matrices = [fn(whole) if whole is not None else None for whole in self.matrices]
        places = [factor[0].device for factor in self.factors if factor] + [
            w.device for w in self.matrices if w is not None
        ]
        self.scales = self.scales.to(places[0]) if places else self.scales

    @property
    def averaged(self) -> bool:
        """Whether the average has a part of the experts' residuals."""
        return self.shares is not None and bool(self.shares[-1].any())

    def turned(self) -> SlabResidual:
        """Of the transposed matrix, where this is the whole slab's."""
        factors = [(factor[1].T, factor[0].T) if factor else None for factor in self.factors]
        matrices = [value.T if value is not None else None for value in self.matrices]
        return SlabResidual(slice(None), factors, self.ratios, matrices, self.shares)

    def dense(self, base: Tensor, weights: Weights) -> Tensor:
        """The whole matrix [out, in] of a row with these weights of the experts, the average's last."""
        total = weights[-1] * base.float()
        for n, weight in enumerate(weights[:-1]):
            whole, factor = self.matrices[n] if self.matrices else None, self.factors[n]
            if not weight:
                continue
            total += weight * (self.ratios[n] * base.float() if whole is None else whole.float())
            if factor and whole is None and self.shares is None:
                total += weight * (factor[1].float() @ factor[0].float())
        of_pairs = (torch.tensor(weights) @ self.shares).tolist() if self.shares is not None else []
        for share, factor in zip(of_pairs, self.factors, strict=False):
            if share and factor:
                total += share * (factor[1].float() @ factor[0].float())
        return total.to(base.dtype)


Slabs = dict[tuple[str, int], list[SlabResidual]]


@dataclass(frozen=True)
class Layout:
    """How a fused block is computed: tokens times one matrix, what is between, times the other.

    Attributes:
        first, last: the parameters [E, out, in], or [E, in, out] where `transposed`.
        biases: what is added to the products of those parameters that have one.
    """

    first: str
    last: str
    transposed: bool
    biases: Mapping[str, str]

    @property
    def parameters(self) -> set[str]:
        """All that it uses."""
        return {self.first, self.last, *self.biases.values()}


class MixedBlockExperts(nn.Module):
    """Takes the place of a fused block.

    Args:
        slabs: (parameter, block expert) -> its matrices' residuals, [out, in].
        biases: parameter -> every expert's own bias [E, out], or None for the base's.
    """

    inner: Any

    def __init__(
        self,
        state: Assignment,
        inner: nn.Module,
        slabs: Slabs,
        layout: Layout,
        biases: Mapping[str, Sequence[Tensor | None]] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.state, self.inner, self.layout, self._slabs = state, inner, layout, slabs
        self._averaged = any(residual.averaged for slab in slabs.values() for residual in slab)
        for parameter, values in biases.items():
            base = getattr(inner, layout.biases[parameter]).detach()
            table = torch.stack([base if value is None else value.to(base) for value in (*values, None)])
            self.register_buffer(f"{parameter}_table", table, persistent=False)  # [N + 1, E, out]

    def _apply(self, fn: Any, recurse: bool = True) -> MixedBlockExperts:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for residual in (residual for slab in self._slabs.values() for residual in slab):
            residual.move(fn)
        return self

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, k], [T, k] -> [T, H]; T is the batch's tokens, row after row."""
        if self.state.average_only and not self._averaged:
            result: Tensor = self.inner(hidden_states, top_k_index, top_k_weights)
            return result
        repeats = self.state.repeats(hidden_states.shape[0])
        weights = self.state.weights.repeat_interleave(repeats, dim=0)  # [T, N + 1]
        total = torch.zeros_like(hidden_states)
        count = getattr(self.inner, self.layout.last).shape[0]
        for block in torch.unique(top_k_index).tolist():
            token, place = torch.where(top_k_index == block)
            if block >= count:
                continue  # transformers marks tokens of other devices this way
            rows = weights[token]
            between = self._between(self._product(self.layout.first, block, hidden_states[token], rows))
            y = self._product(self.layout.last, block, between, rows)
            total.index_add_(0, token, (y * top_k_weights[token, place, None]).to(total.dtype))
        return total

    def _between(self, y: Tensor) -> Tensor:
        """What transformers' blocks do between the two products, or a module of its own way."""
        inner = self.inner
        if self.layout.first == "up_proj":
            result: Tensor = inner.act_fn(y)
        elif hasattr(inner, "_apply_gate"):
            result = inner._apply_gate(y)
        else:
            gate, up = y.chunk(2, dim=-1)
            result = inner.act_fn(gate) * up
        return result

    def _product(self, parameter: str, block: int, x: Tensor, rows: Tensor) -> Tensor:
        """One matrix of the block for tokens x [t, in] with the experts' weights in each, rows [t, N + 1]."""
        weight = getattr(self.inner, parameter)[block]
        y = F.linear(x, weight.T if self.layout.transposed else weight)
        experts = range(self.state.first, self.state.last)
        for residual in self._slabs.get((parameter, block), []):
            add_mixed(y[:, residual.rows], mixed_ratio(rows, residual.scales), residual.terms(x, rows, experts))
        if parameter in self.layout.biases:
            y += self._bias(parameter, block, rows).to(y.dtype)
        return y

    def _bias(self, parameter: str, block: int, rows: Tensor) -> Tensor:
        table: Tensor | None = getattr(self, f"{parameter}_table", None)
        if table is None:
            bias: Tensor = getattr(self.inner, self.layout.biases[parameter])[block]
            return bias
        return rows @ table[:, block].float()


@dataclass
class Piece:
    """What the experts have beyond the base in some rows of a parameter.

    Attributes:
        target: the rows of the parameter, counted over all dimensions but the last.
        factors, ratios, matrices, shares: as SlabResidual's, for these rows.
    """

    target: Tensor
    factors: list[tuple[Tensor, Tensor] | None]
    ratios: list[float]
    matrices: list[Tensor | None]
    shares: Tensor | None = None

    @classmethod
    def of(
        cls,
        part: Part,
        factors: Sequence[tuple[Tensor, Tensor] | None],
        ratios: list[float],
        tensors: Sequence[Tensor | None],
        *,
        transposed: bool = False,
        shares: Tensor | None = None,
    ) -> Piece:
        """From what is stored: A [r, in] and B [out, r], or whole tensors, of which the part is some rows.

        Args:
            transposed: the matrix is stored [in, out].
        """
        turned = [(f[1].T, f[0].T) if f and part.transposed != transposed else f for f in factors]
        source = part.source
        whole = [_rows(v, part.transposed)[source.to(v.device)] if v is not None else None for v in tensors]
        return cls(
            part.target,
            [(f[0], f[1][source.to(f[1].device)]) if f else None for f in turned],
            ratios,
            whole if any(v is not None for v in whole) else [],
            shares,
        )


def _rows(stored: Tensor, transposed: bool) -> Tensor:
    turned = stored.transpose(-1, -2) if transposed else stored
    return turned.reshape(-1, turned.shape[-1]) if turned.dim() > 1 else turned


class FusedWeight(OwnTensor):
    """A parameter that is stored in pieces, of a module that computes in its own way: made whole when it is needed, and
    not kept."""

    kept = False

    def __init__(self, module: nn.Module, name: str, pieces: Sequence[Piece]) -> None:
        super().__init__(module, name, [])
        self.pieces = pieces
        self.residuals = [
            SlabResidual(slice(None), piece.factors, piece.ratios, piece.matrices, piece.shares) for piece in pieces
        ]
        self.averaged = any(residual.averaged for residual in self.residuals)

    def of(self, weights: Weights) -> Tensor:
        whole: Tensor = self.home[self.name].detach().clone()
        rows = whole.view(-1, whole.shape[-1]) if whole.dim() > 1 else whole
        for piece, residual in zip(self.pieces, self.residuals, strict=True):
            target = piece.target.to(whole.device)
            rows[target] = residual.dense(rows[target], weights)
        return whole

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        for residual in self.residuals:
            residual.move(fn)


def layout_of(inner: nn.Module) -> Layout | None:
    """How MixedBlockExperts computes a block; None where it cannot. By its shapes, and by trying it."""
    parameters = dict(inner.named_parameters(recurse=False))
    first = "up_proj" if "up_proj" in parameters else "gate_up_proj"
    biases = {name: f"{name}_bias" for name in (first, "down_proj") if f"{name}_bias" in parameters}
    for transposed in (False, True):
        layout = Layout(first, "down_proj", transposed, biases)
        if layout.parameters == parameters.keys() and _fits(parameters, layout) and _computes_alike(inner, layout):
            return layout
    return None


def _fits(parameters: Mapping[str, Tensor], layout: Layout) -> bool:
    up, down = parameters[layout.first], parameters[layout.last]
    if up.dim() != 3 or down.dim() != 3:
        return False
    up, down = (p.transpose(1, 2) if layout.transposed else p for p in (up, down))
    return up.shape[2] == down.shape[1] and up.shape[1] == (1 if layout.first == "up_proj" else 2) * down.shape[2]


def _computes_alike(inner: Any, layout: Layout) -> bool:
    last = getattr(inner, layout.last)
    blocks, width = last.shape[0], last.shape[2 if layout.transposed else 1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator).to(last)
    index = torch.arange(4, device=x.device)[:, None] % blocks
    share = torch.linspace(0.5, 1.0, 4, device=x.device)[:, None].to(x)
    state = Assignment(["expert"], x.device)
    state.set("expert", 1)
    tolerance = 1e-4 if x.dtype == torch.float32 else 5e-2
    try:
        with torch.no_grad():
            expected = inner(x, index, share)
            got = MixedBlockExperts(state, inner, {}, layout)(x, index, share)
        return bool((got - expected).norm() <= tolerance * expected.norm())
    except Exception:  # it wants something else
        return False


def locate(target: Tensor, rows: int) -> tuple[int, slice] | None:
    """The block expert's slab of so many rows that these rows lie in together, and which of its rows they are."""
    block, start = divmod(int(target[0]), rows)
    together = torch.equal(target, torch.arange(int(target[0]), int(target[0]) + len(target)))
    return (block, slice(start, start + len(target))) if together and start + len(target) <= rows else None
