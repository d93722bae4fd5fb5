"""Notes, while a model runs, what its modules are given and give, and who reads which parameter.

Knows torch's hooks, and what may be said of a module that was seen so. The two runs are compared elsewhere
(`polymerge.model.trial`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .digest import Call

HARMLESS = {"dtype", "device", "shape", "ndim", "is_cuda", "is_cpu", "is_meta", "layout", "requires_grad", "itemsize"}
HARMLESS |= {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_complex", "__len__"}

Stack = tuple[str, ...]  # kinds of the modules that are running, outermost first


def kind_of(name: str) -> str:
    """A module's name without the numbers of layers and block experts."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


@dataclass
class Kind:
    """What was seen of the modules of one kind.

    Attributes:
        called: by way of its forward.
        clear: it gets and gives tensors, numbers and text alone, as often in both batches.
        single: it is called with one tensor and nothing else, and gives one.
        seen: for every tensor that goes in, by position or name, and comes out ("->"), what it was found to be.
        reads: for every parameter, what was running whenever it was read.
        stacks: what was running whenever the module was called, itself included.
    """

    called: bool = False
    clear: bool = True
    single: bool = True
    seen: dict[str, set[str]] = field(default_factory=dict)
    reads: dict[str, list[Stack]] = field(default_factory=dict)
    stacks: list[Stack] = field(default_factory=list)

    @property
    def rows(self) -> bool:
        """Whether it can be run for some rows apart: all that goes in or comes out follows the rows or is the same
        for all."""
        gives = [what for key, what in self.seen.items() if key.startswith("->")]
        takes = [what for key, what in self.seen.items() if not key.startswith("->")]
        whole = any(what & {"other", "whole"} for what in gives)
        unclear = any("other" in what or what >= {"rows", "whole"} or _undecided(what) for what in takes)
        return self.called and self.clear and bool(gives) and not whole and not unclear

    @property
    def plain(self) -> bool:
        """Whether it is called with one tensor, which follows the rows."""
        return self.rows and self.single and self.seen.get("0", set()) <= {"rows", "alike"}

    @property
    def whole(self) -> frozenset[str]:
        """Arguments that are the same for all rows."""
        return frozenset(key for key, what in self.seen.items() if not what & {"rows", "alike"})


def _undecided(what: set[str]) -> bool:
    """As many parts as rows, but never a change: a head for every row, perhaps."""
    return "alike" in what and "rows" not in what


class Watch:
    """Notes calls and reads while the model runs."""

    def __init__(self, hf: nn.Module, kinds: dict[str, Kind]) -> None:
        self.hf, self.calls, self._kinds = hf, dict[str, list[Call]](), kinds
        self.names = {id(module): name for name, module in hf.named_modules()}
        self._running: list[str] = []
        self._open: list[Call] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.hf.named_modules():
                before = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                after = module.register_forward_hook(self._after(name), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
                if name and (module._parameters or module._buffers):
                    stack.callback(setattr, module, "__class__", type(module))
                    module.__class__ = _spy(type(module), self)
            yield

    def note(self, module: nn.Module, parameter: str, running: Sequence[str]) -> None:
        reads = self._kind(self.names[id(module)]).reads.setdefault(parameter, [])
        stack = tuple(map(kind_of, running))
        if stack not in reads:
            reads.append(stack)

    def read(self, module: nn.Module, parameter: str, value: Tensor) -> Tensor:
        """What a reader gets: outside the module's own forward a tensor that says when its numbers are used."""
        running = list(self._running)
        if self.names[id(module)] in running:
            self.note(module, parameter, running)
            return value
        watched: Any = value.as_subclass(_Watched)
        watched.used = lambda: self.note(module, parameter, running)
        return watched  # type: ignore[no-any-return]

    def _kind(self, name: str) -> Kind:
        return self._kinds.setdefault(kind_of(name), Kind())

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(name)
            stack, kind = tuple(map(kind_of, self._running)), self._kind(name)
            if stack not in kind.stacks:
                kind.stacks.append(stack)
            call = Call(arguments=len(args) + len(kwargs))
            for number, value in enumerate(args):
                call.see(str(number), value)
            for key, value in kwargs.items():
                call.see(key, value)
            self.calls.setdefault(name, []).append(call)
            self._open.append(call)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._running.pop()
            self._open.pop().see("->", output)

        return hook


class _Watched(Tensor):
    """A parameter that was read from outside its module."""

    used: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name not in HARMLESS:
            for value in (*args, *(kwargs or {}).values()):
                for part in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(part, _Watched) and hasattr(part, "used"):
                        part.used()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _spy(cls: type[nn.Module], watch: Watch) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        value = cls.__getattr__(self, name)
        return watch.read(self, name, value) if isinstance(value, Tensor) else value

    made = type(cls.__name__, (cls,), {"__getattr__": read, "__module__": cls.__module__})
    made.__qualname__ = cls.__qualname__
    return made
