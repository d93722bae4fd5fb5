"""What every row of a batch has of every pair of factors, and the rows brought together by pair.

Made once for a batch, of numbers that the host knows, so that no layer waits for the device: how many rows each pair
has is never read back. Knows rows and pairs; does not know layers or experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Member(NamedTuple):
    """The rows that have a part of one pair.

    Attributes:
        pair: its number.
        rows: of the batch, in order.
        parts: of the pair in each, not 0.
    """

    pair: int
    rows: list[int]
    parts: list[float]


class Entries(NamedTuple):
    """Rows of a layer's first dimension, those of one pair together. A row is in as many entries as it has pairs.

    Attributes:
        rows: [M] int64.
        parts: [M] float32; None where all are 1.
        slots: [M] int64, the pair of every entry, by its place among those that the layer holds.
        used: those places, once each, or a slice where they follow each other; every one has `size` entries.
        size: 0 where they have different numbers of entries.
        ends: [places] int32, the last entry + 1 of every place that the layer holds.
        back: [rows], the entry of every row; None where a row has none, or several.
    """

    rows: Tensor
    parts: Tensor | None
    slots: Tensor
    used: Tensor | slice
    size: int
    ends: Tensor
    back: Tensor | None


class Shares:
    """Of one batch.

    Args:
        table: [B, K] float32 on the CPU.
        device: of the layers.
    """

    def __init__(self, table: Tensor, device: torch.device) -> None:
        self.table, self.device = table, device
        self._kept: dict[tuple[object, ...], Entries] = {}

    @cached_property
    def on_device(self) -> Tensor:
        """The table."""
        return on_device(self.table, self.device)

    @cached_property
    def members(self) -> list[Member]:
        """Of every pair that a row has a part of."""
        columns = enumerate(self.table.T.tolist())
        kept = [(pair, [(row, part) for row, part in enumerate(column) if part]) for pair, column in columns]
        return [Member(pair, [row for row, _ in of], [part for _, part in of]) for pair, of in kept if of]

    def of(self, places: Sequence[int | None]) -> list[Member]:
        """The members of the pairs that a layer holds: those with a place."""
        return [member for member in self.members if places[member.pair] is not None]

    def entries(self, places: tuple[int | None, ...], repeats: int, *, padded: bool) -> Entries:
        """The rows by pair.

        Args:
            places: of every pair among those that the layer holds, or None.
            repeats: consecutive entries of the layer's first dimension that belong to one row.
            padded: as many entries for every used pair, with parts of 0 where there is nothing.
        """
        key = (places, repeats, padded)
        if key not in self._kept:
            self._kept[key] = self._entries(places, repeats, padded)
        return self._kept[key]

    def padding(self, places: Sequence[int | None]) -> float:
        """How many times as many entries there are with padding as without."""
        sizes = [len(member.rows) for member in self.of(places)]
        return max(sizes) * len(sizes) / sum(sizes)

    def _entries(self, places: tuple[int | None, ...], repeats: int, padded: bool) -> Entries:
        members = self.of(places)
        size = max(len(member.rows) for member in members) if padded else 0
        rows, parts, slots = list[int](), list[float](), list[int]()
        sizes = [0] * (1 + max(place for place in places if place is not None))
        back: dict[int, list[int]] = {row: [] for row in range(len(self.table))}
        for member in members:
            place = places[member.pair]
            assert place is not None
            for number, row in enumerate(member.rows):
                back[row].append(len(rows) + number)
            more = max(0, size - len(member.rows))
            rows += [*member.rows, *[member.rows[0]] * more]
            parts += [*member.parts, *[0.0] * more]
            sizes[place] = len(member.rows) + more
            slots += [place] * sizes[place]
        once = all(len(of) == 1 for of in back.values())
        # beside a row's one entry there is only padding, which nobody takes back
        whole = once and all(part == 1.0 for member in members for part in member.parts)
        used = [place for place, count in enumerate(sizes) if count]
        expanded = torch.tensor(rows)[:, None] * repeats + torch.arange(repeats)
        return Entries(
            on_device(expanded.flatten(), self.device),
            None if whole else on_device(torch.tensor(parts).repeat_interleave(repeats), self.device),
            on_device(torch.tensor(slots).repeat_interleave(repeats), self.device),
            slice(used[0], used[-1] + 1)
            if used[-1] - used[0] == len(used) - 1
            else on_device(torch.tensor(used), self.device),
            size * repeats,
            on_device(torch.tensor(list(accumulate(sizes)), dtype=torch.int32) * repeats, self.device),
            on_device(_back(back, repeats), self.device) if once else None,
        )


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device; the host does not wait until it has arrived."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _back(entries: dict[int, list[int]], repeats: int) -> Tensor:
    first = torch.tensor([of[0] for of in entries.values()])
    return (first[:, None] * repeats + torch.arange(repeats)).flatten()
