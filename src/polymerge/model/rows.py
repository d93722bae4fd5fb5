"""A part of a batch's rows, taken out of arguments and caches, and put together again.

Knows tensors, and containers and caches that hold them. Does not know experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


def part_of(value: Any, key: str, rows: Tensor, batch: int, whole: frozenset[str]) -> Any:
    """These rows of every tensor in an argument; one row stands for all.

    Args:
        key: of the argument; its parts are found under `key.name`, `key.0`.
        batch: rows of the whole. A first dimension that is a multiple of it has several entries a row.
        whole: keys of what is not split.
    """
    if isinstance(value, Tensor):
        if key in whole or not value.dim() or value.shape[0] == 1:
            return value
        if value.shape[0] % batch:
            raise ModelError(f"a layer got {value.shape[0]} rows for a batch of {batch}; experts cannot be told apart")
        return value[expanded(rows, value.shape[0] // batch)]
    if isinstance(value, Mapping):
        parts = {name: part_of(part, _join(key, name), rows, batch, whole) for name, part in value.items()}
        return parts if type(value) is dict else type(value)(**parts)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        items = [part_of(part, _join(key, number), rows, batch, whole) for number, part in enumerate(value)]
        return _like(value, items)
    return value


def joined(outputs: Sequence[Any], rows: Sequence[Tensor], repeats: int = 1) -> Any:
    """The outputs of parts in the order of the whole batch.

    Args:
        rows: of the whole batch, for every part.
        repeats: entries a row of the batch has, where an output is one for all rows of its part.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return _joined_tensors(outputs, rows, repeats)
    if isinstance(first, Mapping):
        parts = {name: joined([output[name] for output in outputs], rows, repeats) for name in first}
        return parts if type(first) is dict else type(first)(**parts)
    if isinstance(first, list | tuple):
        return _like(first, [joined(parts, rows, repeats) for parts in zip(*outputs, strict=True)])
    if _is_container(first):
        raise ModelError(f"{type(first).__name__}: what a layer gives cannot be put together from its rows")
    return first


def expanded(rows: Tensor, repeats: int) -> Tensor:
    """Numbers of the entries that belong to these rows."""
    if repeats == 1:
        return rows
    return (rows[:, None] * repeats + torch.arange(repeats, device=rows.device)).flatten()


def cache_part(cache: Any, rows: Tensor, batch: int, dim: int | None = None) -> Any:
    """A cache of these rows alone. One that knows how is asked (`part`); of any other, a copy is taken apart.

    Args:
        dim: of its tensors that the rows are; by default the first, or the second (that of positions on many axes).
    """
    return cache.part(rows) if hasattr(cache, "part") else _Parts(rows, batch, dim).of(cache)


def join_cache(cache: Any, parts: Sequence[Any], rows: Sequence[Tensor], dim: int | None = None) -> Any:
    """Puts what parts have become into the cache that they were taken from; without one, into the first part's."""
    if hasattr(cache, "part"):  # its parts wrote into it
        return cache
    return _Joins(rows, dim).into(cache, parts)


def _dim_of(value: Tensor, batch: int, dim: int | None) -> int | None:
    positions = value.dim() == 3 and not value.is_floating_point()  # [axes, B, T]
    wanted = (dim,) if dim is not None else (1,) if positions else (0, 1)
    dims = [d for d in wanted if value.dim() > max(1, d) and value.shape[d] == batch]
    return dims[0] if dims else None


def _joined_tensors(outputs: Sequence[Tensor], rows: Sequence[Tensor], repeats: int) -> Tensor:
    sizes = [len(numbers) for numbers in rows]
    if not outputs[0].dim():
        raise ModelError("a layer gives one number for all rows (a loss?); experts cannot be told apart")
    if all(output.shape[0] == 1 for output in outputs) and set(sizes) != {1}:
        outputs = [o.expand(n * repeats, *o.shape[1:]) for o, n in zip(outputs, sizes, strict=True)]
    times = {output.shape[0] / size for output, size in zip(outputs, sizes, strict=True)}
    if len(times) > 1 or not (each := next(iter(times))).is_integer():
        shapes = [list(output.shape) for output in outputs]
        raise ModelError(f"a layer gave {shapes} for {sizes} rows; experts cannot be told apart")
    together = torch.cat(list(outputs))
    result = torch.empty_like(together)
    result[torch.cat([expanded(numbers, int(each)) for numbers in rows])] = together
    return result


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _like(value: Any, items: list[Any]) -> Any:
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(items) if type(value) in (list, tuple) else items


def _is_container(value: Any) -> bool:
    """An object that may hold tensors of rows: a cache and its layers."""
    from transformers import PretrainedConfig

    atoms = (Tensor, nn.Module, PretrainedConfig, type, torch.dtype, torch.device)
    return hasattr(value, "__dict__") and not isinstance(value, atoms) and not callable(value)


class _Parts:
    """Copies an object and what it holds, with these rows of every tensor that has as many as the batch."""

    def __init__(self, rows: Tensor, batch: int, dim: int | None) -> None:
        self.rows, self.batch, self.dim, self._seen = rows, batch, dim, dict[int, Any]()

    def of(self, value: Any) -> Any:
        if id(value) in self._seen:
            return self._seen[id(value)]
        if isinstance(value, Tensor):
            dim = _dim_of(value, self.batch, self.dim)
            return value if dim is None else value.index_select(dim, self.rows.to(value.device))
        if isinstance(value, dict):
            return type(value)({name: self.of(part) for name, part in value.items()})
        if isinstance(value, list | tuple):
            return _like(value, [self.of(part) for part in value])
        if not _is_container(value):
            return value
        made = copy.copy(value)
        self._seen[id(value)] = made
        for name, part in vars(value).items():
            vars(made)[name] = self.of(part)
        return made


class _Joins:
    """The inverse of `_Parts`, in place where there is an object already."""

    def __init__(self, rows: Sequence[Tensor], dim: int | None) -> None:
        self.rows, self.dim, self._seen = rows, dim, set[int]()

    def into(self, whole: Any, parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, Tensor):
            return self._tensor(whole, parts)
        if isinstance(first, dict):
            old = whole if isinstance(whole, dict) else {}
            made = {name: self.into(old.get(name), [part[name] for part in parts]) for name in first}
            if type(whole) is type(first):
                whole.clear()
                whole.update(made)
                return whole
            return type(first)(made)
        if isinstance(first, list | tuple):
            same = isinstance(whole, list | tuple) and len(whole) == len(first)
            before = list(whole) if same else [None] * len(first)
            items = [self.into(old, new) for old, new in zip(before, zip(*parts, strict=True), strict=True)]
            if isinstance(whole, list):
                whole[:] = items
                return whole
            return _like(first, items)
        return self._object(whole, parts) if _is_container(first) else first

    def _tensor(self, whole: Any, parts: Sequence[Tensor]) -> Tensor:
        sizes = [len(numbers) for numbers in self.rows]
        dims = {_dim_of(part, size, self.dim) for part, size in zip(parts, sizes, strict=True)}
        if isinstance(whole, Tensor) and whole.numel():  # it is the rows' now if it was before
            dims = {_dim_of(whole, sum(sizes), self.dim)}
        if len(dims) != 1 or (dim := dims.pop()) is None:
            return parts[0]
        together = torch.cat(list(parts), dim=dim)
        order = torch.cat([numbers.to(together.device) for numbers in self.rows]).argsort()
        return together.index_select(dim, order)

    def _object(self, whole: Any, parts: Sequence[Any]) -> Any:
        target = whole if type(whole) is type(parts[0]) else parts[0]
        if id(target) in self._seen:
            return target
        self._seen.add(id(target))
        before = dict(vars(target)) if target is whole else {}
        made = {name: self.into(before.get(name), [vars(part)[name] for part in parts]) for name in vars(parts[0])}
        vars(target).update(made)
        return target
