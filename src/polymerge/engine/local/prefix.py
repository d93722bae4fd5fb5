"""Keys and values of beginnings that were read before: a system prompt that many requests share is read once.

Kept in blocks of some tokens, each known by the block before it, its tokens and the expert that read them: a block's
keys and values depend on that and on nothing else. Which blocks go first is decided by their use: those that were not
used for longest, and of one beginning its end first. Knows tokens and tensors; does not know answers or batches.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from ...model.assignment import RowExpert

# Tokens of a block. What does not fill one is read anew.
BLOCK = 64


def voice_of(expert: RowExpert) -> Hashable:
    """The same for experts that make the same keys and values."""
    if expert is None or isinstance(expert, str):
        return expert or "average"
    total = sum(expert.values())
    return tuple(sorted((name, weight / total) for name, weight in expert.items() if weight))


def common(expert: RowExpert, tokens: Sequence[int], other: RowExpert, others: Sequence[int]) -> int:
    """How many of the first tokens one prompt can take from another that was read, in whole blocks."""
    if voice_of(expert) != voice_of(other):
        return 0
    pairs = zip(tokens[:-1], others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) // BLOCK * BLOCK


@dataclass(eq=False)
class Block:
    """Attributes:
    number: of this block, which those that follow it are known by.
    states: keys and values [2, layers, heads, BLOCK, dim].
    """

    number: int
    states: Tensor


class PrefixCache:
    """Args:
    most: tokens that it may hold.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._blocks: OrderedDict[Hashable, Block] = OrderedDict()  # what was used last stands last
        self._numbers = itertools.count()

    @property
    def tokens(self) -> int:
        """That it holds."""
        return BLOCK * len(self._blocks)

    def known(self, expert: RowExpert, tokens: Sequence[int]) -> int:
        """How many of the first tokens it holds. The last token is never among them: it is read for what comes next."""
        return BLOCK * sum(1 for _ in self._chain(expert, tokens[:-1]))

    def states(self, expert: RowExpert, tokens: Sequence[int], length: int) -> Tensor:
        """Keys and values of the first `length` tokens, [2, layers, heads, length, dim]; no more than are known."""
        keys = [key for key, _ in self._chain(expert, tokens[: length + BLOCK - 1])]
        self._used(keys)
        return torch.cat([self._blocks[key].states for key in keys], dim=3)[:, :, :, :length]

    def keep(self, expert: RowExpert, tokens: Sequence[int], layers: Sequence[Any], row: int) -> None:
        """Remembers what was read.

        Args:
            tokens: of the row.
            layers: of a cache; a row's keys and values end with the last column. Of one shape, or nothing is kept.
        """
        pairs = [(layer.keys[row], layer.values[row]) for layer in layers if _has_states(layer)]
        whole = len(tokens) // BLOCK
        if not pairs or len({pair[0].shape for pair in pairs} | {pair[1].shape for pair in pairs}) > 1:
            return
        chain = list(self._chain(expert, tokens))
        keys = [key for key, _ in chain]
        first, parent = len(chain), chain[-1][1].number if chain else voice_of(expert)
        if whole <= first or self.most < BLOCK:
            return
        start = pairs[0][0].shape[1] - len(tokens)
        part = slice(start + first * BLOCK, start + whole * BLOCK)
        states = torch.stack([torch.stack([pair[n][:, part] for pair in pairs]) for n in (0, 1)])
        for number, piece in enumerate(torch.split(states, BLOCK, dim=3), first):
            key = (parent, tuple(tokens[number * BLOCK : (number + 1) * BLOCK]))
            self._blocks[key] = Block(next(self._numbers), piece.clone())
            parent = self._blocks[key].number
            keys.append(key)
        self._used(keys)
        self.fit(self.most)

    def fit(self, tokens: int) -> None:
        """Forgets until no more than so many tokens are held."""
        while self._blocks and self.tokens > max(0, min(tokens, self.most)):
            self._blocks.popitem(last=False)

    def _used(self, keys: Sequence[Hashable]) -> None:
        """Of one beginning, in order: no block goes before those that follow it."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _chain(self, expert: RowExpert, tokens: Sequence[int]) -> Iterator[tuple[Hashable, Block]]:
        parent = voice_of(expert)
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            key = (parent, tuple(tokens[start : start + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                return
            yield key, block
            parent = block.number


def _has_states(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and layer.is_initialized
