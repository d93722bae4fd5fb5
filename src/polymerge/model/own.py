"""Modules of which experts have their own whole parameters: norms, embeddings, heads, routers, layers at rate 0.

`OwnModule` runs any module once for every distinct expert among the rows, with that expert's parameters in place.
`OwnNorm` does it in one pass for norms, which only need their weight to follow the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .assignment import Assignment
from .linear import mixed_rows


class OwnModule(nn.Module):
    """Any module whose inputs have the batch (or its flattened tokens) as their first dimension.

    Args:
        own: for every expert, its parameters by name; what an expert lacks is the base's.
    """

    def __init__(self, state: Assignment, inner: nn.Module, own: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.state, self.inner = state, inner
        self._own = own

    def _apply(self, fn: Any, recurse: bool = True) -> OwnModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._own = [{name: fn(value) for name, value in expert.items()} for expert in self._own]
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # transformers reads `embed_tokens.weight`, `lm_head.out_features` and the like
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if state.average_only:
            return self.inner(*args, **kwargs)
        if len(state.groups) == 1:
            return functional_call(self.inner, self._parameters_of(0), args, kwargs)
        size = _first_dimension(args, kwargs, state.rows)
        repeats = state.repeats(size)
        outputs, numbers = [], []
        for group, (_, rows) in enumerate(state.groups):
            if repeats > 1:
                rows = (rows[:, None] * repeats + torch.arange(repeats, device=rows.device)).flatten()
            picked = [_rows_of(value, rows, size) for value in args]
            named = {name: _rows_of(value, rows, size) for name, value in kwargs.items()}
            outputs.append(functional_call(self.inner, self._parameters_of(group), tuple(picked), named))
            numbers.append(rows)
        return _joined(outputs, torch.cat(numbers))

    def _parameters_of(self, group: int) -> dict[str, Tensor]:
        return self.state.once((id(self), group), lambda: self._mixed(self.state.groups[group][0]))

    def _mixed(self, weights: tuple[float, ...]) -> dict[str, Tensor]:
        base = dict(self.inner.named_parameters())
        names = {name for expert in self._own for name in expert}
        sets: list[Mapping[str, Tensor]] = [*self._own, {}]
        if 1.0 in weights:
            chosen = sets[weights.index(1.0)]
            return {name: chosen.get(name, base[name]) for name in names}
        return {
            name: torch.stack([w * sets[n].get(name, base[name]).float() for n, w in enumerate(weights) if w])
            .sum(0)
            .to(base[name].dtype)
            for name in names
        }


class OwnNorm(nn.Module):
    """A norm with one weight (and perhaps a bias) that follows the rows."""

    def __init__(self, state: Assignment, inner: nn.Module, own: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.state, self.inner = state, inner
        for name, value in inner.named_parameters():
            table = torch.stack([expert.get(name, value.data).to(value.data) for expert in (*own, {})])  # [N + 1, H]
            self.register_buffer(f"{name}_table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., H] -> [B, ..., H]"""
        if self.state.average_only:
            result: Tensor = self.inner(x)
            return result
        weight = self._rows("weight_table", x)
        if isinstance(self.inner, nn.LayerNorm):
            y = F.layer_norm(x, self.inner.normalized_shape, eps=self.inner.eps) * weight
            return y + self._rows("bias_table", x) if self.inner.bias is not None else y
        # An instance attribute is found before nn.Module looks among its parameters.
        self.inner.__dict__["weight"] = weight
        try:
            normed: Tensor = self.inner(x)
            return normed
        finally:
            del self.inner.__dict__["weight"]

    def _rows(self, name: str, x: Tensor) -> Tensor:
        def make() -> Tensor:
            return self.state.of_rows(mixed_rows(self.state, getattr(self, name)), x.shape[0], x.dim())

        return self.state.once((id(self), name, x.shape[0], x.dim()), make)


def wrap_own(state: Assignment, inner: nn.Module, own: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """The fastest wrapper that gives the module's own results with these parameters."""
    if isinstance(inner, nn.LayerNorm) and inner.elementwise_affine:
        return OwnNorm(state, inner, own)
    names = [name for name, _ in inner.named_parameters()]
    if names == ["weight"] and inner.get_parameter("weight").dim() == 1 and _weight_may_follow_rows(inner):
        return OwnNorm(state, inner, own)
    return OwnModule(state, inner, own)


def _weight_may_follow_rows(inner: nn.Module) -> bool:
    """Tries whether a weight of one row each gives what the module gives row by row."""
    weight = inner.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    width = weight.shape[0]
    x = torch.randn(2, 3, width, generator=generator).to(weight)
    rows = torch.randn(2, width, generator=generator).to(weight)
    try:
        with torch.no_grad():
            inner.__dict__["weight"] = rows[:, None, :]
            together = inner(x)
            inner.__dict__.pop("weight")
            apart = torch.cat([functional_call(inner, {"weight": rows[i]}, (x[i : i + 1],)) for i in range(2)])
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        inner.__dict__.pop("weight", None)
    return isinstance(together, Tensor) and torch.equal(together, apart)


def _first_dimension(args: Sequence[Any], kwargs: Mapping[str, Any], rows: int) -> int:
    sizes = [v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
    size = max(sizes, default=rows)
    return rows if size == 1 else size  # one row of positions stands for all


def _rows_of(value: Any, rows: Tensor, size: int) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if value.shape[0] == 1 and size > 1:
        return value.expand(len(rows), *value.shape[1:])
    return value[rows]


def _joined(outputs: Sequence[Any], numbers: Tensor) -> Any:
    if isinstance(outputs[0], tuple):
        return tuple(_joined(parts, numbers) for parts in zip(*outputs, strict=True))
    together = torch.cat(list(outputs))
    result = torch.empty_like(together)
    result[numbers] = together
    return result
