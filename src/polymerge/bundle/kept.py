"""Rows of a table that an expert keeps: those that are not the average's, and their numbers beside them.

Knows how they are stored in an expert's file; which table is kept is `polymerge.merging.treatment`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What follows a table's key in the key of the numbers (int32, in order) of the rows that are stored of it.
ROW_NUMBERS = ".row_numbers"


def rows_are_smaller(count: int, rows: int) -> bool:
    """Whether so many of a table's rows are stored as such: a table that nearly all of them are is stored whole."""
    return count * 10 <= rows * 9


def numbers_problem(numbers: Tensor, stored: Tensor, shape: tuple[int, ...]) -> str | None:
    """What is wrong with rows of a table of this shape and their numbers, if anything."""
    if numbers.dim() != 1 or len(numbers) != len(stored) or stored.shape[1:] != shape[1:]:
        return f"has {list(numbers.shape)} numbers for rows {list(stored.shape)} of {list(shape)}"
    rising = bool((numbers[1:] > numbers[:-1]).all())
    if numbers.dtype != torch.int32 or not rising or (len(numbers) and not 0 <= int(numbers[0]) <= int(numbers[-1])):
        return "has numbers of rows that are not in order"
    if len(numbers) and int(numbers[-1]) >= shape[0]:
        return f"has a row {int(numbers[-1])} of {shape[0]}"
    return None
