"""Hidden states of a model's layers, by a forward pass that ends where the last one wanted is known.

Knows how transformers counts hidden states: number k is what goes into layer k. Does not know texts or pooling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn


class _Read(Exception):
    """Everything wanted is read; the layers that are left need not run."""


def hidden_states(model: Any, layers: Sequence[int], **inputs: Any) -> list[Tensor]:
    """The hidden states [batch, tokens, hidden] of these layers, counted as transformers does, in their order.

    Args:
        model: a transformers model without its head.

    Raises:
        IndexError: the model has no such layer.
    """
    blocks = _blocks(model)
    wanted = [layer if layer >= 0 else layer + len(blocks) + 1 for layer in layers]
    known: dict[int, Tensor] = {}
    if blocks and min(wanted) >= 0 and max(wanted) < len(blocks):  # the last is only known after the final norm
        with _reading(blocks, set(wanted), known), suppress(_Read):
            model(**inputs)
    if known:
        return [known[layer] for layer in wanted]
    states = model(**inputs, output_hidden_states=True).hidden_states
    return [states[layer] for layer in layers]


def _blocks(model: Any) -> Sequence[nn.Module]:
    """The model's layers in their order; none where they are not in one list."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []


@contextmanager
def _reading(blocks: Sequence[nn.Module], wanted: set[int], known: dict[int, Tensor]) -> Iterator[None]:
    """Notes what goes into these blocks, and ends the pass at the last of them."""

    def note(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            known[layer] = args[0] if args else kwargs["hidden_states"]
            if len(known) == len(wanted):
                raise _Read

        return hook

    handles = [blocks[layer].register_forward_pre_hook(note(layer), with_kwargs=True) for layer in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
