"""Which tokens an expert knows: the first so many rows of a bundle's tables. What it does not know, it can't say.

The logits of a bundle have a place for every token of its tables, whoever speaks, so that a batch has one shape; behind
an expert's own vocabulary they are -inf, and its softmax over the rest is what its own model gives. Knows numbers of
rows and logits; does not know tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .assignment import Assignment, RowExpert
from .own import Weights, take_forward
from .personas import AVERAGE
from .rows import expanded


class Vocabularies:
    """Those of a loaded bundle.

    Args:
        names: of the experts.
        sizes: of theirs, and the average's last; None for all rows.
        rows: of the tables.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int | None], rows: int) -> None:
        self._numbers = {name: number for number, name in enumerate((*names, AVERAGE))}
        self._sizes, self.rows = [rows if size is None else size for size in sizes], rows
        self.differ = any(size < rows for size in self._sizes)

    def of(self, expert: RowExpert) -> int:
        """How many tokens an expert knows. A mixture knows what all its members know."""
        names = expert if isinstance(expert, Mapping) else [AVERAGE if expert is None else expert]
        return min(self._sizes[self._numbers[name]] for name in names)

    def of_weights(self, weights: Weights) -> int:
        """The same by the experts' weights, the average's last."""
        return min(size for size, weight in zip(self._sizes, weights, strict=True) if weight)

    def check(self, experts: Sequence[RowExpert], ids: Tensor, mask: Tensor | None) -> None:
        """Raises ModelError for a token that a row's expert does not know.

        Args:
            ids: [B, T]. mask: [B, T], 0 where there is padding.
        """
        seen = ids if mask is None or mask.shape != ids.shape else ids.masked_fill(mask == 0, 0)
        for expert, largest in zip(experts, seen.amax(dim=1).tolist(), strict=True) if ids.numel() else ():
            if largest >= self.of(expert):
                raise ModelError(
                    f"token {largest}: the vocabulary of {expert or AVERAGE!r} ends at {self.of(expert) - 1}"
                )


def tokens_of(hf: Any) -> int:
    """Rows of the tables of a transformers model."""
    return int(hf.config.get_text_config().vocab_size)


def place_vocabularies(hf: Any, state: Assignment, vocabularies: Vocabularies) -> None:
    """Takes the place of a model's forward, where an expert's vocabulary is not the whole table."""
    if vocabularies.differ:
        _Narrowed(hf, state, vocabularies)


class _Narrowed:
    def __init__(self, hf: Any, state: Assignment, vocabularies: Vocabularies) -> None:
        self._forward, self._state, self._vocabularies = hf.forward, state, vocabularies
        take_forward(hf, self.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, without the logits of tokens that a row's expert does not know."""
        if kwargs.get("labels") is not None:
            raise ModelError(
                "labels: the experts have vocabularies of their own, and a loss would count tokens that they do not "
                "know; take it from the logits"
            )
        output = self._forward(*args, **kwargs)
        self._narrow(output[0] if isinstance(output, tuple) else output.logits)
        return output

    def _narrow(self, logits: Tensor) -> None:
        """logits [B, T, V], in place."""
        state, vocabularies = self._state, self._vocabularies
        repeats = logits.shape[0] // state.rows
        for weights, rows in state.groups:
            size = vocabularies.of_weights(weights)
            if size == vocabularies.rows:
                continue
            if len(state.groups) == 1:
                logits[..., size:] = -torch.inf
            else:
                logits[expanded(rows, repeats), ..., size:] = -torch.inf
