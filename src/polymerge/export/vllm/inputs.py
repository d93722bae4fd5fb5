"""How large the columns of linear layers' inputs are, summed up while a model reads.

Knows modules and their inputs, and padding on the right. Does not know what is read, nor by whom.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...engine.local.forced import tokens_there


@dataclass
class Sums:
    """What has been read so far.

    Attributes:
        lengths: tokens of every row that is read next; what follows them is padding.
        squares: module -> sum over all tokens of the squares of its input's columns, [in] float32, every token scaled
            to length 1.
    """

    lengths: Sequence[int] = ()
    squares: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def summed(model: nn.Module, modules: Iterable[str]) -> Iterator[Sums]:
    """Sums up what the modules are given inside the block. Whoever reads says the lengths of the rows before."""
    sums = Sums()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().flatten(0, -2).square()  # [tokens, in]
            weights = squares.sum(-1).clamp(min=1e-24).reciprocal()
            counted = tokens_there(sums.lengths).to(weights)
            if len(counted) == len(weights):  # otherwise a block chose among the tokens
                weights *= counted
            total = weights @ squares
            sums.squares[name] = sums.squares[name] + total if name in sums.squares else total

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in modules]
    try:
        yield sums
    finally:
        for one in hooks:
            one.remove()
