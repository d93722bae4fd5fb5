"""Orders of neurons and heads, against every order there is."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from polymerge.method.align import best_head_order, best_order, groups_of, likeness, moved, units


def value(products: torch.Tensor, order: tuple[int, ...]) -> float:
    return float(products[list(range(len(order))), list(order)].sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_neurons_has_more(seed: int) -> None:
    products = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
    best = max(permutations(range(6)), key=lambda order: value(products, order))
    assert tuple(best_order(products).tolist()) == best


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_heads_that_leaves_groups_whole_has_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, groups = torch.randn(6, 6, generator=generator), torch.randn(3, 3, generator=generator)
    found = tuple(best_head_order(queries, groups).tolist())

    def whole(order: tuple[int, ...]) -> bool:
        return all(order[2 * g] // 2 == order[2 * g + 1] // 2 for g in range(3))

    def worth(order: tuple[int, ...]) -> float:
        return value(queries, order) + value(groups, tuple(order[2 * g] // 2 for g in range(3)))

    best = max((order for order in permutations(range(6)) if whole(order)), key=worth)
    assert whole(found) and worth(found) == pytest.approx(worth(best))
    assert groups_of(torch.tensor(found), 3).tolist() == [found[2 * g] // 2 for g in range(3)]


def test_where_nothing_is_gained_all_stays() -> None:
    same = torch.ones(5, 5)
    assert best_order(same).tolist() == [0, 1, 2, 3, 4] == best_order(torch.zeros(5, 5)).tolist()
    assert best_head_order(torch.ones(4, 4), torch.ones(2, 2)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("heads", [[0, 2, 1, 3], [0, 0, 2, 3], [1, 2, 3, 4]])
def test_what_tears_groups_apart_is_no_order_of_heads(heads: list[int]) -> None:
    with pytest.raises(ValueError, match="no order of heads"):
        groups_of(torch.tensor(heads), 2)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shuffled_matrix_is_found_again(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, places = torch.randn(12, 12, generator=generator), torch.arange(12).reshape(2, 6).T  # a fused pair
    shuffle = torch.randperm(6, generator=generator)
    other = moved(matrix, dim, places, shuffle)
    assert not torch.equal(matrix, other)
    order = best_order(likeness(units(matrix, dim, places), units(other, dim, places)))
    assert torch.equal(moved(other, dim, places, order), matrix)
    kept = moved(matrix, dim, places[:, :1], shuffle)  # the second half is no unit's
    assert torch.equal(kept.movedim(dim, 0)[6:], matrix.movedim(dim, 0)[6:])
