"""How many bytes a model keeps of the tokens that it has read: keys and values, latent ones, windows, states.

Measured, not worked out: the architecture reads two tokens and then three on the meta device, without weights, and
what its own cache holds afterwards is counted. The one place that counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

# Fields of a model's answer that nothing is kept in.
ANSWERS = ("loss", "logits", "hidden_states", "attentions")


@dataclass(frozen=True)
class Part:
    """One layer's, or all that no layer has.

    Attributes:
        state: bytes whatever the number of tokens. each: bytes a token. window: of so many tokens at most.
    """

    state: float
    each: float
    window: int | None = None


@dataclass(frozen=True)
class Remembered:
    """Of one conversation."""

    parts: tuple[Part, ...]

    @property
    def state(self) -> float:
        return sum(part.state for part in self.parts)

    @property
    def each(self) -> float:
        """Bytes a token, as long as no window is full."""
        return sum(part.each for part in self.parts)

    def bytes(self, tokens: int) -> int:
        return int(sum(p.state + p.each * (min(tokens, p.window) if p.window else tokens) for p in self.parts))


def remembered(cls: Any, config: Any, dtype: torch.dtype) -> Remembered:
    """What a model of this class and configuration keeps, in `dtype`. Of one that does not run without weights (XLNet,
    JetMoe) its layers' keys and values of all heads are counted.

    Args:
        cls: transformers' class of the model.
    """
    try:
        with torch.device("meta"), torch.no_grad(), _NoNumbers():  # type: ignore[no-untyped-call]
            model = cls._from_config(config).to(dtype).eval()
            set_experts = getattr(model, "set_experts_implementation", None)
            if set_experts is not None:
                set_experts("batched_mm")  # the others know how many tokens each expert has
            few, more = (list(_kept(_read(model, tokens))) for tokens in (2, 3))
    except Exception as error:  # a model that looks at its numbers, which meta tensors have none of
        log.info("%s does not run without weights: %s", cls.__name__, error)
        return Remembered(tuple(_by_names(config.get_text_config(), dtype)))
    parts = (Part(a - 2 * (b - a), b - a, window) for (a, _), (b, window) in zip(few, more, strict=True))
    return Remembered(tuple(parts))


def _by_names(config: Any, dtype: torch.dtype) -> Iterator[Part]:
    queries = getattr(config, "num_attention_heads", None)
    if isinstance(queries, int) and queries:
        heads = getattr(config, "num_key_value_heads", None) or queries
        width = getattr(config, "head_dim", None) or config.hidden_size // queries
        yield Part(0, 2 * config.num_hidden_layers * heads * width * dtype.itemsize)


def _read(model: Any, tokens: int) -> Any:
    return model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True, return_dict=True)


def _kept(answer: Any) -> Iterator[tuple[int, int | None]]:
    """(bytes, window) of every layer of every cache in a model's answer."""
    for name, value in answer.items():
        if name not in ANSWERS:
            for part in getattr(value, "layers", None) or [value]:
                window = getattr(part, "sliding_window", None)
                yield sum(tensor.nbytes for tensor in _tensors(part)), window - 1 if window else None


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
        return
    if isinstance(thing, dict):
        thing = thing.values()
    elif not isinstance(thing, list | tuple):
        thing = vars(thing).values() if hasattr(thing, "__dict__") else ()
    for part in thing:
        yield from _tensors(part)


class _NoNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Models that look at their numbers, which meta tensors have none of, find zeros, and that all conditions hold."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool
        if function is torch.ops.aten.nonzero.default:
            return args[0].new_empty(0, args[0].dim(), dtype=torch.long)
        return function(*args, **(kwargs or {}))
