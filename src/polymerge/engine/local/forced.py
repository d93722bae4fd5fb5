"""Several texts in one pass of a model: what it says of tokens that are given (teacher forcing).

Knows token ids and logits; does not know whose they are, nor what they are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# logits(ids [B, T]) -> [B, T, vocabulary]; rows are padded on the right, which no earlier token of a causal model sees
Logits = Callable[[Tensor], Tensor]
# Tokens of texts that run together, padding counted.
TOGETHER = 1024

Row = TypeVar("Row")


def batches(rows: Sequence[Row], length: Callable[[Row], int], together: int = TOGETHER) -> Iterator[list[Row]]:
    """Rows in their order, so many at once as have at most `together` tokens, padding counted; 0 is each alone."""
    batch: list[Row] = []
    for row in rows:
        if batch and max(length(r) for r in (*batch, row)) * (len(batch) + 1) > together:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def tokens_there(lengths: Sequence[int]) -> Tensor:
    """Whether a place of rows that are padded on the right is a token: [rows * longest]"""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).flatten()


def read_together(ids: Sequence[Sequence[int]], logits: Logits, device: torch.device | None = None) -> list[Tensor]:
    """[T, vocabulary] of every row of token ids, in one call of `logits`, which takes its ids on the device."""
    padded = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    with torch.no_grad():
        said = logits(padded.to(device))
    return [of_row[: len(row)] for row, of_row in zip(ids, said, strict=True)]
