"""Modules of which experts have their own whole parameters: norms, embeddings, heads, routers, layers at rate 0.

`OwnModule` runs a module once for every distinct expert among the rows, with that expert's parameters in place: its own
and those of modules inside it. `OwnNorm` does it in one pass for norms, whose weight may follow the rows. Both leave
the module where and what it is and take the place of its `forward` alone, so that whatever else is done with it stays
right. Which of them is right for a module, and where, was tried before (`polymerge.model.trial`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .assignment import Assignment
from .linear import MixedLinear, mixed_rows
from .rows import expanded, joined, part_of

# weights of the experts in a row, the average's last
Weights = tuple[float, ...]


class OwnTensor:
    """One parameter or buffer of a module, of which experts have their own.

    Args:
        values: for every expert its own, or None for the base's. Where a parameter is two modules', one list is both's,
            so that neither a move nor a change of dtype makes two of what was one.
    """

    kept = True  # a mixture is made once for a batch
    averaged = False  # the average has a part of the experts' residuals
    placed = False  # an expert's stands in the module's place of it

    def __init__(self, module: nn.Module, name: str, values: list[Tensor | None]) -> None:
        self.module, self.name = module, name
        self.values = values
        self.values[:] = [v.to(self.home[name].dtype) if v is not None else None for v in values]

    @property
    def home(self) -> dict[str, Any]:
        """Where the module keeps it."""
        return self.module._parameters if self.name in self.module._parameters else self.module._buffers

    def of(self, weights: Weights) -> Tensor:
        """For a row with these weights. One expert's is its own, to the bit."""
        base: Tensor = self.home[self.name].detach()
        if 1.0 in weights:
            value = [*self.values, None][weights.index(1.0)]
            return base if value is None else value
        if not base.is_floating_point():  # a table, in which no two experts differ
            return base
        values = [base if value is None else value for value in (*self.values, None)]
        parts = [weight * value.float() for weight, value in zip(weights, values, strict=True) if weight]
        return torch.stack(parts).sum(0).to(base.dtype)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.values[:] = [fn(value) if value is not None else None for value in self.values]


class OwnWeight(OwnTensor):
    """The weight of a linear layer that cannot be run from its factors: made dense when it is needed, and not kept."""

    kept = False

    def __init__(self, module: nn.Module, layer: MixedLinear, *, transposed: bool, name: str = "weight") -> None:
        super().__init__(module, name, [])
        self.layer, self.transposed, self.averaged = layer, transposed, layer.averaged

    def of(self, weights: Weights) -> Tensor:
        dense = self.layer.dense(weights)
        return dense.T if self.transposed else dense

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.layer._apply(fn)  # type: ignore[no-untyped-call]


class OwnModule(nn.Module):
    """Takes the place of a module's forward.

    Args:
        inner: stays the caller's; it is no part of this one.
        whole: arguments that are not split by rows, by position or name.

    Attributes:
        blends: what it gives for a mean of parameters is the mean of what it gives for each.
    """

    inner: nn.Module
    blends = False

    def __init__(self, state: Assignment, inner: nn.Module, whole: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.state, self.whole = state, whole
        self.tensors: list[OwnTensor] = []
        self.__dict__["inner"], self._forward = inner, inner.forward
        take_forward(inner, self.forward)

    def _apply(self, fn: Any, recurse: bool = True) -> OwnModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in self.tensors:
            tensor.move(fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, for every group of rows."""
        state = self.state
        if state.average_only and not any(tensor.averaged for tensor in self.tensors):
            return self._forward(*args, **kwargs)
        if state.fixed:
            return self._of_all(args, kwargs)
        if self.blends and state.pure is not None:
            return self._blended(args, kwargs)
        if len(state.groups) == 1:
            with self.in_place():
                return self._forward(*args, **kwargs)
        outputs = [self._of(weights, rows, args, kwargs) for weights, rows in state.groups]
        return joined(outputs, [rows for _, rows in state.groups], state.beams)

    @property
    def takes_numbers(self) -> bool:
        """As ExpertLinear's. A parameter that is made anew for every pass would be made for all experts."""
        return all(tensor.kept and not tensor.averaged for tensor in self.tensors)

    def _of_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Every expert's output for all rows, of which each takes its own."""
        state = self.state
        count, numbers = len(state.names), state.numbers
        result: Tensor = self._forward(*args, **kwargs)
        for number in range(count):
            if all(tensor.values[number] is None for tensor in self.tensors):
                continue
            with state.narrowed(tuple(float(n == number) for n in range(count + 1))), self.in_place():
                y: Tensor = self._forward(*args, **kwargs)
            result = torch.where((numbers == number).view(-1, *[1] * (y.dim() - 1)), y, result)
        return result

    def _of(self, weights: Weights, rows: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.state
        picked = part_of(args, "", rows, state.rows, self.whole)
        named = part_of(kwargs, "", rows, state.rows, self.whole)
        with state.narrowed(weights), self.in_place():
            return self._forward(*picked, **named)

    def _blended(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Every expert's output for the rows that have a part of it, so that no mixture's parameters are made."""
        state, total = self.state, None
        for weights, rows, parts in state.columns:
            y: Tensor = self._of(weights, rows, args, kwargs)
            if len(y) == 1:
                y = y.expand(len(rows) * state.beams, *y.shape[1:])
            repeats = len(y) // len(rows)
            if total is None:
                total = torch.zeros(state.rows * repeats, *y.shape[1:], dtype=torch.float32, device=y.device)
            share = parts.repeat_interleave(repeats, output_size=len(y)).view(-1, *[1] * (y.dim() - 1))
            total.index_add_(0, expanded(rows, repeats), y.float() * share)
        assert total is not None
        return total.to(y.dtype)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the modules have the parameters of the one expert or mixture that the state is narrowed to."""
        weights = self.state.groups[0][0]
        if weights[-1] == 1.0 and not any(tensor.averaged for tensor in self.tensors):
            yield
            return
        before = []
        try:
            for number, tensor in enumerate(self.tensors):
                if tensor.placed:  # by a module around this one
                    continue
                make = functools.partial(tensor.of, weights)
                value = self.state.once((id(self), number), make) if tensor.kept else make()
                before.append((tensor, tensor.home[tensor.name]))
                tensor.home[tensor.name], tensor.placed = value, True
            yield
        finally:
            for tensor, value in before:
                tensor.home[tensor.name], tensor.placed = value, False


class OwnNorm(nn.Module):
    """Takes the place of the forward of a norm with one weight (and perhaps a bias) that follows the rows."""

    inner: Any

    def __init__(self, state: Assignment, inner: nn.Module, tensors: Mapping[str, Sequence[Tensor | None]]) -> None:
        super().__init__()
        self.state = state
        self.__dict__["inner"], self._forward = inner, inner.forward
        self._plain = not _weight_may_follow_rows(inner)
        for name, base in inner.named_parameters():
            values = [*tensors.get(name, [None] * len(state.names)), None]
            table = torch.stack([base.data if v is None else v.to(base.data) for v in values])  # [N + 1, H]
            self.register_buffer(f"{name}_table", table, persistent=False)
        take_forward(inner, self.forward)

    @property
    def takes_numbers(self) -> bool:
        """As ExpertLinear's."""
        return True

    @staticmethod
    def fits(inner: nn.Module) -> bool:
        """Tries whether it gives what the module gives row by row."""
        names = {name for name, _ in inner.named_parameters()}
        if "weight" not in names or not names <= {"weight", "bias"} or inner.get_parameter("weight").dim() != 1:
            return False
        return (names == {"weight"} and _weight_may_follow_rows(inner)) or _is_layer_norm(inner)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., H] -> [B, ..., H]"""
        if self.state.average_only:
            result: Tensor = self._forward(x)
            return result
        weight = self._rows("weight_table", x)
        if self._plain:
            y = F.layer_norm(x, self.inner.normalized_shape, eps=self.inner.eps) * weight
            return y + self._rows("bias_table", x) if self.inner.bias is not None else y
        # An instance attribute is found before nn.Module looks among its parameters.
        self.inner.__dict__["weight"] = weight
        try:
            normed: Tensor = self._forward(x)
            return normed
        finally:
            del self.inner.__dict__["weight"]

    def _rows(self, name: str, x: Tensor) -> Tensor:
        state, table = self.state, getattr(self, name)
        key = (id(self), name, x.shape[0], x.dim())
        return state.once(key, lambda: state.of_rows(mixed_rows(state, table), x.shape[0], x.dim()))


def take_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Puts a function in the place of a module's forward; it looks like it to whoever reads its signature."""
    original = module.forward

    @functools.wraps(original)
    def instead(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    module.__dict__["forward"] = instead


def _weight_may_follow_rows(inner: nn.Module) -> bool:
    """Tries whether a weight of one row each gives what the module gives row by row."""
    weight = inner.get_parameter("weight")
    x, rows = _numbers(weight, 2, 3), _numbers(weight, 2)
    try:
        with torch.no_grad():
            inner.__dict__["weight"] = rows[:, None, :]
            together = inner(x)
            inner.__dict__.pop("weight")
            apart = torch.cat([_with_weight(inner, rows[i], x[i : i + 1]) for i in range(2)])
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        inner.__dict__.pop("weight", None)
    return isinstance(together, Tensor) and torch.equal(together, apart)


def _with_weight(inner: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    inner.__dict__["weight"] = weight
    try:
        result: Tensor = inner(x)
        return result
    finally:
        del inner.__dict__["weight"]


def _is_layer_norm(inner: nn.Module) -> bool:
    """Tries whether a layer norm has no arithmetic of its own."""
    if not isinstance(inner, nn.LayerNorm) or not inner.elementwise_affine or len(inner.normalized_shape) != 1:
        return False
    weight, bias = _numbers(inner.weight, 1)[0], inner.bias
    x = _numbers(inner.weight, 2, 3)
    with torch.no_grad():
        expected = F.layer_norm(x, inner.normalized_shape, weight, bias, inner.eps)
        try:
            return torch.equal(_with_weight(inner, weight, x), expected)
        except (RuntimeError, TypeError, ValueError):
            return False


def _numbers(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, like.shape[0], generator=generator).to(like)
