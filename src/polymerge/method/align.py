"""In which order another model's neurons and heads fit a first model's best.

A model stays the same function when the neurons of an MLP change places, or its attention heads do, each group of query
heads with the key and value head that it reads: every tensor that has the axis is permuted alike. Of all such orders
the one is taken in which the tensors' inner products with the first model's add up to the most, which is where the
squared distance is the least: "weight matching" of Ainsworth, Hayase and Srinivasa, "Git Re-Basin" (2023, arXiv
2209.04836, section 3.2), with the hidden dimension as it is, so that every axis is one linear assignment and none waits
for another.

Pure functions on tensors. Knows nothing of names, files or architectures.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An order must gain more than the rounding of the products over the one that is there.
ROUNDING = 1e-6


def likeness(first: Tensor, other: Tensor) -> Tensor:
    """Inner products of the units of two models: [n, w] and [n, w] -> [n, n] in float32, row i the first's unit i."""
    return first.float() @ other.float().T


def best_order(products: Tensor) -> Tensor:
    """The units of the other model in the order in which they fit the first's best.

    Args:
        products: [n, n], `likeness` summed over all tensors that have the axis.

    Returns:
        int64 [n], on the CPU: unit i of the aligned model is unit order[i] of the other one.
    """
    n = products.shape[0]
    order = products.argmax(1).cpu()
    if len(set(order.tolist())) < n:  # each unit's best is not another's: the largest sum that there can be
        from scipy.optimize import linear_sum_assignment

        _, columns = linear_sum_assignment(products.cpu().numpy(), maximize=True)
        order = torch.from_numpy(columns).long()
    return order if _gains(products.cpu(), order) else torch.arange(n)


def best_head_order(queries: Tensor, groups: Tensor) -> Tensor:
    """The query heads of the other model in the order in which they fit the first's best, groups staying together.

    Every pair of groups has the best order of its own heads inside; what that order is worth, and what the group's key
    and value head are, is the entry of the assignment of groups.

    Args:
        queries: [heads, heads], summed over the tensors with an axis of query heads.
        groups: [groups, groups], over those with an axis of key-value heads; heads are a multiple of groups.

    Returns:
        int64 [heads]: head i of the aligned model is head order[i] of the other one.
    """
    count, size = groups.shape[0], queries.shape[0] // groups.shape[0]
    blocks = queries.cpu().reshape(count, size, count, size).transpose(1, 2)  # [groups, groups, size, size]
    inside = torch.stack(
        [torch.stack([best_order(block) for block in row]) for row in blocks]
    )  # [groups, groups, size]
    worth = blocks.gather(3, inside.unsqueeze(3)).sum((2, 3))
    outer = best_order(groups.cpu() + worth)
    heads = torch.stack([outer[g] * size + inside[g, outer[g]] for g in range(count)])
    return heads.flatten()


def groups_of(heads: Tensor, groups: int) -> Tensor:
    """The order of the key-value heads that goes with an order of query heads: [heads] -> [groups].

    Raises:
        ValueError: heads of one group are torn apart, or it is no order at all.
    """
    size = len(heads) // groups
    rows = heads.reshape(groups, size) // size
    if not torch.equal(heads.sort().values, torch.arange(len(heads))) or not bool((rows == rows[:, :1]).all()):
        raise ValueError("is no order of heads that leaves their groups whole")
    return rows[:, 0]


def moved(tensor: Tensor, dim: int, places: Tensor, order: Tensor) -> Tensor:
    """A tensor with the units of one axis in another order.

    Args:
        places: int64 [units, width], where along `dim` each unit's numbers lie. What lies elsewhere stays.
        order: int64 [units].
    """
    index = torch.arange(tensor.shape[dim])
    index[places.flatten()] = places[order].flatten()
    return tensor.index_select(dim, index)


def units(tensor: Tensor, dim: int, places: Tensor) -> Tensor:
    """The numbers of every unit of an axis as a row: [units, width * all other dimensions]."""
    rows = tensor.movedim(dim, 0)[places.flatten()]
    return rows.reshape(places.shape[0], -1)


def _gains(products: Tensor, order: Tensor) -> bool:
    rows = torch.arange(len(order))
    stay, move = products.diagonal().double().sum(), products[rows, order].double().sum()
    return bool(move - stay > ROUNDING * products.diagonal().abs().double().sum())
