"""Rows taken out of arguments and caches, and put together again."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from polymerge.errors import ModelError
from polymerge.model.rows import cache_part, join_cache, joined, part_of

GROUPS = [torch.tensor([0, 3]), torch.tensor([2]), torch.tensor([1])]
NOTHING: frozenset[str] = frozenset()


def test_parts_are_put_together_in_the_order_of_the_batch() -> None:
    batch = torch.arange(4 * 3).view(4, 3)
    parts = [part_of(batch, "0", rows, 4, NOTHING) for rows in GROUPS]
    assert torch.equal(joined(parts, GROUPS), batch)


def test_rows_of_several_entries_stay_together() -> None:
    tokens = torch.arange(12)[:, None]  # four rows of three tokens
    parts = [part_of(tokens, "0", rows, 4, NOTHING) for rows in GROUPS]
    assert parts[0].flatten().tolist() == [0, 1, 2, 9, 10, 11]
    assert torch.equal(joined(parts, GROUPS), tokens)


def test_one_row_stands_for_all_and_what_is_whole_is_not_split() -> None:
    one, heads = torch.zeros(1, 5), torch.zeros(4, 5)
    assert part_of(one, "0", GROUPS[0], 4, NOTHING) is one
    assert part_of({"bias": heads}, "", GROUPS[0], 4, frozenset({"bias"}))["bias"] is heads


def test_an_answer_for_all_rows_becomes_each_rows() -> None:
    parts = [torch.full((1, 2), float(group)) for group in range(3)]
    assert joined(parts, GROUPS)[:, 0].tolist() == [0.0, 2.0, 1.0, 0.0]
    assert joined(parts, GROUPS, repeats=2)[:, 0].tolist() == [0.0, 0.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0]


def test_containers_keep_their_kind() -> None:
    outputs = [CausalLMOutputWithPast(logits=torch.full((len(r), 1), float(g))) for g, r in enumerate(GROUPS)]
    together = joined(outputs, GROUPS)
    assert isinstance(together, CausalLMOutputWithPast)
    assert together.logits[:, 0].tolist() == [0.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([torch.tensor(1.0)] * 3, "one number"),
        ([torch.zeros(3, 1)] * 3, "cannot be told apart"),
        ([object.__new__(DynamicCache)] * 3, "DynamicCache"),
    ],
)
def test_what_cannot_be_put_together_is_refused(parts: list[object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        joined(parts, GROUPS)
    with pytest.raises(ModelError, match="7 rows for a batch of 4"):
        part_of(torch.zeros(7, 1), "0", GROUPS[0], 4, NOTHING)


def test_a_caches_parts_go_on_alone_and_come_back_into_it() -> None:
    cache, expected = DynamicCache(), DynamicCache()
    first, then = torch.randn(4, 2, 5, 3), torch.randn(4, 2, 1, 3)
    for layer in range(2):
        cache.update(first, first + 1, layer)
        expected.update(first, first + 1, layer)
        expected.update(then, then + 1, layer)
    parts = [cache_part(cache, rows, 4) for rows in GROUPS]
    for part, rows in zip(parts, GROUPS, strict=True):
        for layer in range(2):
            keys, _ = part.update(then[rows], then[rows] + 1, layer)
            assert torch.equal(keys, torch.cat([first, then], dim=2)[rows])
    assert join_cache(cache, parts, GROUPS) is cache
    for got, wanted in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(got.keys, wanted.keys) and torch.equal(got.values, wanted.values)


def test_a_cache_that_the_parts_made_themselves_is_put_together_too() -> None:
    whole, parts = torch.randn(4, 2, 5, 3), [DynamicCache() for _ in GROUPS]
    for part, rows in zip(parts, GROUPS, strict=True):
        part.update(whole[rows], whole[rows], 0)
    assert torch.equal(join_cache(None, parts, GROUPS).layers[0].keys, whole)
