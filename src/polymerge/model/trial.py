"""What the modules of a model do with their parameters and with the rows of a batch, found by running it.

Two small batches that differ in their first row alone are run through the model, a step with the cache included. From
what changes between them is read which tensors follow the rows; and while they run, it is noted who reads which
parameter. Nothing here knows an architecture, or the class of a module.

Modules of which a model has many (layers, block experts) are judged together: what one of them does, all may do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .digest import ROWS, Call
from .quantised import is_quantised
from .watch import Kind, Watch, kind_of

WIDTH = 4  # tokens of a row, at most
# A change is larger than this share of a tensor's size.
CHANGE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


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

    def _run(self, hf: Any, other: bool) -> dict[str, list[Call]]:
        watch = Watch(hf, self._kinds)
        inputs = _inputs(hf, other)
        self.inputs = frozenset(inputs)
        with torch.no_grad(), watch.watching():
            _forward_and_step(hf, inputs)
        return watch.calls

    @staticmethod
    def _judge(kind: Kind, first: Sequence[Call], second: Sequence[Call], change: float) -> None:
        kind.called = True
        kind.clear &= len(first) == len(second)
        for one, two in zip(first, second, strict=False):
            follows = one.compared(two, change)
            kind.clear &= one.clear
            kind.single &= one.arguments == 1 and list(follows) == ["->", "0"]
            for key, what in follows.items():
                kind.seen.setdefault(key, set()).add(what)


def _same_inputs(first: Mapping[str, list[Call]], second: Mapping[str, list[Call]]) -> dict[str, int]:
    numbers: dict[tuple[bytes, ...], int] = {}
    inputs = {}
    for name in first.keys() & second.keys():
        calls = [*first[name], *second[name]]
        if all("0" in call.values for call in calls):
            key = tuple(call.values["0"].numpy().tobytes() for call in calls)
            inputs[name] = numbers.setdefault(key, len(numbers))
    return inputs


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
