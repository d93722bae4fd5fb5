"""What the modules of a model do with their parameters and with the rows of a batch, found by running it.

Two small batches that differ in their first row alone are run through the model, a step with the cache included. From
what changes between them is read which tensors follow the rows; and while they run, it is noted who reads which
parameter. Nothing here knows an architecture, or the class of a module.

Modules of which a model has many (layers, block experts) are judged together: what one of them does, all may do.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .quantised import is_quantised

ROWS, WIDTH = 3, 4  # of the trial's batches
# A tensor is reduced to this many random sums for every row; a change is larger than this share of their size.
SUMS, CHANGE = 16, {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
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


class Trial:
    """Tried on the model itself, with its own weights.

    Attributes:
        objection: why the model cannot be run for several experts; then nothing is known of any module.
        inputs: arguments of the model that were tried.
        states: (module, attribute) of tensors that modules hold from one call to the next.
    """

    def __init__(self, hf: Any) -> None:
        self._kinds: dict[str, Kind] = {}
        self._inputs_of: dict[str, int] = {}
        self.objection, self.inputs = "", frozenset[str]()
        self.states: list[tuple[str, str]] = []
        before, held = _marks(hf), _held(hf)
        try:
            first, second = (self._run(hf, other) for other in (False, True))
        except Exception as error:  # a model that needs more than tokens
            self.objection = f"not on tokens alone ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            return
        changed = [name for name, mark in _marks(hf).items() if not torch.equal(mark, before[name])]
        if changed:  # RWKV divides weights by powers of two when it is first run
            self.objection = f"it changes its own weights while it runs, {changed[0]} for one"
            return
        self.states = [place for place, value in _held(hf).items() if held.get(place) is not value]
        for name, _ in self.states:  # whoever runs such a module runs it for all rows
            for kind in {kind for stack in self.kind(name).stacks for kind in stack}:
                self._kinds[kind].clear = False
        self._inputs_of = _same_inputs(first, second)
        change = CHANGE.get(hf.dtype, 1e-3)
        for name in first.keys() | second.keys():
            self._judge(self._kinds[kind_of(name)], first.get(name, []), second.get(name, []), change)

    def kind(self, name: str) -> Kind:
        """Of a module by its name; nothing is known of one that did not run."""
        return self._kinds.get(kind_of(name)) or Kind()

    def input_of(self, name: str) -> int | None:
        """A number that a module shares with those which were given the same whenever it was called; None of one that
        did not run."""
        return self._inputs_of.get(name)

    def read_by_itself(self, name: str, parameters: Sequence[str]) -> bool:
        """Whether nothing but the module's own forward reads these parameters."""
        kind = kind_of(name)
        return all(stack and stack[-1] == kind for p in parameters for stack in self.kind(name).reads.get(p, ()))

    def holder(self, name: str, parameters: Sequence[str]) -> str | None:
        """The kind of the innermost module that is running whenever these parameters are read, and whose rows can be
        run apart; None where there is none but the whole model."""
        kind = self.kind(name)
        stacks = [stack for p in parameters for stack in kind.reads.get(p, ())] + kind.stacks
        if not stacks:
            return None
        always = [k for k in stacks[0] if all(k in stack for stack in stacks)]
        return next((k for k in reversed(always) if k and self._kinds[k].rows), None)

    def is_idle(self, name: str, parameters: Sequence[str]) -> bool:
        """Whether the module did not run and nobody read these parameters."""
        kind = self.kind(name)
        return not kind.called and not any(kind.reads.get(p) for p in parameters)

    def _run(self, hf: Any, other: bool) -> dict[str, list[_Call]]:
        watch = _Watch(hf, self._kinds)
        inputs = _inputs(hf, other)
        self.inputs = frozenset(inputs)
        with torch.no_grad(), watch.watching():
            _forward_and_step(hf, inputs)
        return watch.calls

    @staticmethod
    def _judge(kind: Kind, first: Sequence[_Call], second: Sequence[_Call], change: float) -> None:
        kind.called = True
        kind.clear &= len(first) == len(second)
        for one, two in zip(first, second, strict=False):
            follows = one.compared(two, change)
            kind.clear &= one.clear
            kind.single &= one.arguments == 1 and list(follows) == ["->", "0"]
            for key, what in follows.items():
                kind.seen.setdefault(key, set()).add(what)


@dataclass
class _Call:
    """Digests of what went into a module and came out ("->")."""

    arguments: int
    values: dict[str, Tensor] = field(default_factory=dict)
    clear: bool = True

    def see(self, key: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.values[key] = _digest(value)
        elif isinstance(value, Mapping):
            for name, part in value.items():
                self.see(f"{key}.{name}", part)
        elif isinstance(value, list | tuple):
            for number, part in enumerate(value):
                self.see(f"{key}.{number}" if key != "->" else key if len(value) == 1 else f"->.{number}", part)
        elif not isinstance(value, ATOMS) and not callable(value):
            self.clear = False

    def compared(self, other: _Call, change: float) -> dict[str, str]:
        """For every tensor: it follows the "rows"; it is the same in all batches and has as many parts as there are
        rows ("alike"), or one ("one"), or any number ("whole"); or something "other"."""
        keys = self.values.keys() | other.values.keys()
        return {key: _compared(self.values.get(key), other.values.get(key), change) for key in sorted(keys)}


def _same_inputs(first: Mapping[str, list[_Call]], second: Mapping[str, list[_Call]]) -> dict[str, int]:
    numbers: dict[tuple[bytes, ...], int] = {}
    inputs = {}
    for name in first.keys() & second.keys():
        calls = [*first[name], *second[name]]
        if all("0" in call.values for call in calls):
            key = tuple(call.values["0"].numpy().tobytes() for call in calls)
            inputs[name] = numbers.setdefault(key, len(numbers))
    return inputs


ATOMS = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size, slice)


def _digest(value: Tensor) -> Tensor:
    """[parts, SUMS + 1]: for every row random sums of its numbers, squashed, and their size; the shape comes first.

    One part where the first dimension is not a multiple of the rows. A complex number (turned positions) is two.
    """
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    parts = ROWS if value.dim() and value.shape[0] and not value.shape[0] % ROWS else 1
    flat = value.detach().reshape(parts, -1).float().nan_to_num()
    flat = flat / (1 + flat.abs())
    sums = flat @ _signs(flat.shape[1], flat.device) / max(1, flat.shape[1]) ** 0.5
    size = flat.norm(dim=1, keepdim=True) / max(1, flat.shape[1]) ** 0.5
    first = value.shape[0] if value.dim() else 0
    return torch.cat([sums, size, torch.full_like(size, float(first))], dim=1).cpu()


@functools.lru_cache(maxsize=16)
def _signs(length: int, device: torch.device) -> Tensor:
    """[length, SUMS] of 1 and -1, the same for every tensor of a length."""
    generator = torch.Generator().manual_seed(length)
    signs = torch.randint(0, 2, (length, SUMS), generator=generator)
    return signs.to(device, torch.float32) * 2 - 1


def _compared(one: Any, two: Any, change: float) -> str:
    if one is None or two is None or one.shape != two.shape or not torch.equal(one[:, -1], two[:, -1]):
        return "other"
    far = (one[:, :-2] - two[:, :-2]).abs().amax(dim=1) > change * (one[:, -2] + two[:, -2]).clamp(min=1e-6)
    if not far.any():
        return "alike" if len(one) == ROWS else "one" if one[0, -1] == 1 else "whole"
    return "rows" if len(one) == ROWS and far.tolist() == [True, *[False] * (ROWS - 1)] else "other"


class _Watch:
    """Notes calls and reads while the model runs."""

    def __init__(self, hf: nn.Module, kinds: dict[str, Kind]) -> None:
        self.hf, self.calls, self._kinds = hf, dict[str, list[_Call]](), kinds
        self.names = {id(module): name for name, module in hf.named_modules()}
        self._running: list[str] = []
        self._open: list[_Call] = []

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
            call = _Call(arguments=len(args) + len(kwargs))
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


def _spy(cls: type[nn.Module], watch: _Watch) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        value = cls.__getattr__(self, name)
        return watch.read(self, name, value) if isinstance(value, Tensor) else value

    made = type(cls.__name__, (cls,), {"__getattr__": read, "__module__": cls.__module__})
    made.__qualname__ = cls.__qualname__
    return made


def _marks(hf: nn.Module) -> dict[str, Tensor]:
    """The first numbers of every parameter."""
    plain = ((name, parameter) for name, parameter in hf.named_parameters() if not is_quantised(parameter))
    return {name: parameter.detach().flatten()[:64].clone() for name, parameter in plain}


def _held(hf: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Tensors that are plain attributes of modules."""
    attributes = ((name, key, value) for name, module in hf.named_modules() for key, value in vars(module).items())
    return {(name, key): value for name, key, value in attributes if isinstance(value, Tensor)}


def _inputs(hf: Any, other: bool) -> dict[str, Tensor]:
    """Rows of 4, 3 and 2 tokens, padded on the left; with `other`, the first one has 3 and says something else."""
    vocabulary = int(hf.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 4, vocabulary - vocabulary // 4, (ROWS, WIDTH), generator=generator)
    lengths = [4, 3, 2]
    if other:
        ids[0] = (ids[0] - vocabulary // 4 + vocabulary // 5 + 1) % (vocabulary // 2) + vocabulary // 4
        lengths[0] = 3
    mask = (torch.arange(WIDTH) >= WIDTH - torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    takes = inspect.signature(hf.forward).parameters
    return {name: value.to(hf.device) for name, value in inputs.items() if name in takes}


def _forward_and_step(hf: Any, inputs: Mapping[str, Tensor]) -> None:
    """A forward pass, and where the model can generate a second one with its cache."""
    from transformers import GenerationConfig

    hf(**inputs)
    if not hf.can_generate():
        return
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    given = {name: value for name, value in inputs.items() if name != "position_ids"}
    hf.generate(**given, generation_config=settings)
