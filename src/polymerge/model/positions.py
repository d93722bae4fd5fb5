"""Positions that follow the rows: every expert's cos and sin are made by a rotary module of its own configuration.

A rotary module is known by what it is: without parameters, with a configuration and inverse frequencies. What else of
an architecture reads its settings of positions (YaRN's factor in the scaling of an attention, say) cannot follow the
rows; then experts whose positions differ cannot share a bundle. Knows modules and rows; does not know how a bundle
keeps them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..sources.configuration import POSITIONS
from .assignment import Assignment
from .own import take_forward
from .rows import expanded, joined

# Methods that run when a model is built, or for transformers' own loop alone.
NOT_THE_FORWARD = ("__init__", "_init_weights", "prepare_inputs_for_generation")
OF_A_POSITION = re.compile(rf"config\.(?:{'|'.join(POSITIONS)})\b")
ATOMS = (int, float, str, bool, tuple, list, dict)


def rotary_modules(model: nn.Module) -> dict[str, Any]:
    """Name -> module that makes numbers of positions."""
    return {name: module for name, module in model.named_modules() if _is_rotary(module)}


def objection(base: nn.Module, other: nn.Module) -> str:
    """Why positions of these two cannot stand side by side in one model; empty where they can.

    Args:
        base, other: the same architecture with either configuration; on the meta device will do.
    """
    rotary = rotary_modules(base)
    if not rotary:
        return "the architecture has no module that makes positions of its configuration"
    others: dict[str, Any] = dict(other.named_modules())
    for name, module in rotary.items():
        if not _is_rotary(others.get(name)) or _frequencies(module) != _frequencies(others[name]):
            return f"{type(module).__name__} turns other dimensions"
    for name, module in base.named_modules():
        if name not in rotary and name in others:
            reader = _reads_positions(module, others[name])
            if reader:
                return f"{type(module).__name__} reads {reader} as well"
    return ""


class RowPositions(nn.Module):
    """Takes the place of a rotary module's forward.

    Args:
        inner: stays the caller's; it is no part of this one.
        others: for every expert its own module, or None for the base's.
    """

    inner: nn.Module

    def __init__(self, state: Assignment, inner: nn.Module, others: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.state, self._forward = state, inner.forward
        self.__dict__["inner"] = inner
        different = list({id(module): module for module in others if module is not None}.values())
        self.others = nn.ModuleList(different)
        self._number = [different.index(module) if module is not None else -1 for module in (*others, None)]
        self._names = list(inspect.signature(inner.forward).parameters)[:2]
        take_forward(inner, self.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(x [B, ...], position_ids [1 or B, T], ...) -> what the module gives, every row by its own."""
        parts = self.state.once((id(self), "parts"), self._parts)
        if len(parts) == 1:
            return self._run(next(iter(parts)), args, kwargs)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        x, positions = (given[name] for name in self._names)
        size = x.shape[0]
        repeats = self.state.repeats(size)
        axis = positions.dim() - 2  # where positions have several axes, these come first
        whole = positions.expand(*positions.shape[:axis], size, positions.shape[-1])
        rows = [expanded(numbers, repeats) for numbers in parts.values()]
        outputs = []
        for number, entries in zip(parts, rows, strict=True):
            named = {self._names[0]: x[: len(entries)], self._names[1]: whole.index_select(axis, entries)}
            outputs.append(self._run(number, args[2:], {**kwargs, **named}, first=len(args) > 2))
        return _joined(outputs, rows, axis)

    def _run(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, first: bool = False) -> Any:
        call: Any = self._forward if number < 0 else self.others[number]
        if first:  # what follows the two by position
            args = (kwargs[self._names[0]], kwargs[self._names[1]], *args)
            kwargs = {key: value for key, value in kwargs.items() if key not in self._names}
        return call(*args, **kwargs)

    def _parts(self) -> dict[int, Tensor]:
        """Number of the module (-1: the base's) -> numbers of its rows."""
        gathered: dict[int, list[Tensor]] = {}
        for weights, rows in self.state.groups:
            numbers = {number for number, weight in zip(self._number, weights, strict=True) if weight}
            if len(numbers) > 1:
                raise ModelError("a mixture of experts whose positions differ")
            gathered.setdefault(numbers.pop(), []).append(rows)
        return {number: torch.cat(rows) for number, rows in gathered.items()}


def place_positions(hf: nn.Module, state: Assignment, others: Sequence[nn.Module | None]) -> list[RowPositions]:
    """Lets every rotary module of a loaded model follow the rows.

    Args:
        others: for every expert a model of its own configuration (on the meta device will do), or None for the base's.

    Raises:
        ModelError: positions cannot follow the rows in this architecture.
    """
    placed: list[RowPositions] = []
    if all(other is None for other in others):
        return placed
    for other in others:
        reason = objection(hf, other) if other is not None else ""
        if reason:
            raise ModelError(f"{type(hf).__name__}: experts' positions differ, but {reason}")
    for name, module in rotary_modules(hf).items():
        if not _equal(_made(module.config, module), module):
            raise ModelError(f"{type(module).__name__}: cannot be made from its configuration alone")
        made: dict[int, nn.Module] = {}
        for other in others:
            if other is not None and id(other) not in made:
                made[id(other)] = _made(other.get_submodule(name).config, module)
        placed.append(RowPositions(state, module, [made.get(id(other)) for other in others]))
    return placed


def _is_rotary(module: Any) -> bool:
    weightless = module is not None and hasattr(module, "config") and not any(True for _ in module.parameters())
    return weightless and bool(_frequencies(module))


def _frequencies(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's own inverse frequencies, by name."""
    buffers = module.named_buffers(recurse=False)
    return {name: tuple(buffer.shape) for name, buffer in buffers if name.endswith("inv_freq")}


def _made(config: Any, like: Any) -> nn.Module:
    try:
        made: nn.Module = type(like)(config)
    except Exception as error:  # its class wants more than a configuration
        raise ModelError(f"{type(like).__name__}: cannot be made from a configuration alone ({error})") from None
    buffer = next(like.buffers())
    return made.to(buffer.device).eval()


def _equal(made: nn.Module, loaded: nn.Module) -> bool:
    one, other = dict(made.named_buffers()), dict(loaded.named_buffers())
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name].to(one[name])) for name in one)


def _reads_positions(module: nn.Module, other: nn.Module) -> str | None:
    """What of its settings of positions a module's forward reads, by itself or as what its constructor made of them."""
    source = "\n".join(_sources(type(module)))
    mentioned = OF_A_POSITION.search(source)
    if mentioned:
        return mentioned[0]
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training" or not isinstance(value, ATOMS) or name not in vars(other):
            continue
        if value != vars(other)[name] and re.search(rf"self\.{re.escape(name)}\b", source):
            return name
    return None


def _sources(cls: type) -> Iterator[str]:
    """The methods of an architecture's own classes that take part in a forward pass."""
    for part in cls.__mro__:
        if "modeling_" not in part.__module__.rpartition(".")[2] or part.__module__.count(".") < 2:
            continue
        for name, method in vars(part).items():
            if inspect.isfunction(method) and name not in NOT_THE_FORWARD:
                yield inspect.getsource(method)


def _joined(outputs: Sequence[Any], rows: Sequence[Tensor], axis: int) -> Any:
    """Along the first dimension, or, where positions have axes and the output has kept them, along the next."""
    first = outputs[0]
    if isinstance(first, tuple | list):
        return type(first)(_joined(parts, rows, axis) for parts in zip(*outputs, strict=True))
    if axis and first.dim() > 3:
        return joined([output.transpose(0, axis) for output in outputs], rows).transpose(0, axis)
    return joined(outputs, rows)
