"""The buffers of a running batch: their size, what stays in them, and who is told before they change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from polymerge.engine.local.cache import GROWTH, RunningCache


def read(lengths: Sequence[int]) -> DynamicCache:
    """Keys that say whose they are."""
    cache, width = DynamicCache(), max(lengths)
    states = torch.tensor(lengths, dtype=torch.float32)[:, None, None, None].expand(len(lengths), 1, width, 1)
    for layer in range(2):
        cache.update(states, states, layer)
    return cache


def join(cache: RunningCache, *lengths: int) -> None:
    cache.join(read(lengths), lengths)


def test_buffers_are_as_large_as_is_needed_now_whatever_was_before() -> None:
    cache = RunningCache(lambda: None)
    join(cache, 16_000)
    assert cache.room()[0] == 1 and cache.room()[1] >= 16_000
    cache.leave(0)
    join(cache, *[20] * 32)  # after a long one many short ones
    assert cache.room() == (32, 2 * GROWTH)
    for _ in range(31):
        cache.leave(0)
    join(cache, 16_000)  # and the other way round
    assert cache.room()[0] == 2
    cache.leave(1)
    join(cache, *[20] * 31)  # beside a short one that was padded to a long one
    assert cache.room() == (32, 2 * GROWTH) and cache.lengths == [20] * 32


def test_views_are_dropped_before_buffers_are_made_anew() -> None:
    rooms = list[tuple[int, int]]()
    cache = RunningCache(lambda: rooms.append(cache.room()))
    join(cache, 20)
    first = cache.room()
    assert rooms == [(0, 0)]
    cache.leave(0)
    join(cache, 30)  # which has room where the other was
    assert rooms == [(0, 0)] and cache.room() == first
    join(cache, 10)
    assert rooms == [(0, 0), first]


def test_a_row_has_nothing_of_whoever_had_it_before() -> None:
    """Padded rows of a fixed step write where nobody looks, perhaps no number; 0 times that is none either."""
    cache = RunningCache(lambda: None)
    join(cache, 20, 9, 15)
    cache.leave(2)
    cache.scribbled = True
    for keys, values in filter(None, cache.views(*cache.room())):
        keys[2:], values[2:] = torch.nan, torch.nan
    join(cache, 7)
    for keys, values in filter(None, cache.views(3, cache.room()[1])):
        assert keys.isfinite().all() and values.isfinite().all()
        for row, length in enumerate(cache.lengths):
            mine = keys[row, 0, cache.starts[row] : cache.extent.end, 0]
            assert mine.tolist() == [[20, 9, 7][row]] * length


def test_what_nobody_has_is_zero_whatever_came_and_went() -> None:
    """Also where rows were moved within their buffers, to the front or to make room for a longer one."""
    cache = RunningCache(lambda: None)
    join(cache, 20, 9, 15)
    for turn in range(3 * GROWTH):
        if turn % 40 == 10:
            cache.leave(turn % 3)
        if turn % 40 == 30:
            join(cache, 5 + turn % 200)
        cache.before_step()
        extent = cache.extent
        for layer in cache.layers:
            states = torch.full((extent.rows, 1, 1, 1), float("nan") if turn % 40 == 9 else 1.0)
            layer.update(states, states)
        cache.after_step()
        if turn % 40 == 9:  # whoever has no numbers leaves
            for row in reversed(range(extent.rows)):
                cache.leave(row)
            join(cache, 20, 9, 15)
    for keys, values in filter(None, cache.views(*cache.room())):
        assert keys.isfinite().all() and values.isfinite().all()
        assert not keys[cache.extent.rows :].any()
        for row, start in enumerate(cache.starts):
            assert keys[row, 0, start : cache.extent.end].all()
            assert not keys[row, 0, :start].any() and not keys[row, 0, cache.extent.end :].any()
