"""Tables of experts with other vocabularies: one of the bundle's, and of every expert what it has beyond that.

Every row of the bundle's is the mean of those that stand for its token; an expert's rows that do not are its own,
however the rest of its table is stored. Reads slabs and holds two tables in the bundle's dtype. Who has which rows is
`polymerge.merging.vocabulary`'s; residuals of the rest are `polymerge.merging.compress`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..bundle.files import Rows, raw_bytes, slabs
from .reading import Read, check_stored, check_values
from .treatment import TensorTask
from .vocabulary import Tables

# emit(owner, key, tensor): owner None is the base, otherwise an expert's name; key as in the owner's file
Emit = Callable[[str | None, str, Tensor | Rows], None]


def merge_table(
    task: TensorTask, dtype: torch.dtype, read: Read, emit: Emit, give: Callable[[str, Tensor], None]
) -> dict[str, str]:
    """One table of all experts. Returns expert -> SHA-256 of its tensor's bytes.

    Args:
        dtype: what it is stored in.
        give: called with every expert and the bundle's table as stored; emits what the expert has beyond it.

    Raises:
        SourceError: a value is not finite or too large; names expert and tensor.
    """
    hashes = {expert: hashlib.sha256() for expert in task.sources}
    base = torch.empty(task.shape, dtype=dtype)
    for start, stop in slabs(task.shape):
        mean = _Mean(stop - start, task.shape[1:])
        for expert, source in task.sources.items():
            end = min(stop, _tables(task).sizes[expert])
            if end <= start:
                continue
            rows = read(expert, source, start, end)
            check_values(rows, dtype, expert, source)
            hashes[expert].update(raw_bytes(rows))
            mean.add(rows.float(), ~_is_own(task, expert)[start:end])
        base[start:stop] = mean.of_rows().to(dtype)
        check_stored(base[start:stop], task.name, "the experts' average")
    emit(None, task.name, base)
    for expert in task.sources:
        give(expert, base)
    return {expert: digest.hexdigest() for expert, digest in hashes.items()}


def emit_table(task: TensorTask, expert: str, base: Tensor, read: Read, emit: Emit) -> None:
    """What an expert's table has beyond the bundle's: nothing, its own rows, or a whole table with the bundle's rows
    behind it.

    Args:
        base: the bundle's as stored.
    """
    size, apart = _tables(task).sizes[expert], _is_own(task, expert)
    whole = base.clone()
    for start, stop in slabs((size, *task.shape[1:])):
        whole[start:stop] = read(expert, task.sources[expert], start, stop).to(base.dtype)
    if task.treatment == "average":
        whole[~apart] = base[~apart]
    changed = (whole != base).reshape(len(base), -1).any(dim=1)
    if not bool(changed.any()):
        return
    few = task.holds_rows and not bool((changed & ~apart).any())
    emit(expert, f"{task.record.module}.{task.record.parameter}", whole[apart] if few else whole)


def split_table(task: TensorTask, expert: str, base: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """An expert's table as (whole, told, own): its own in float32; in the bundle's size, with the bundle's rows where
    it has none or others, float32; and these others in the bundle's dtype.

    Args:
        base: the bundle's as stored.
    """
    size, apart = _tables(task).sizes[expert], _is_own(task, expert)
    whole = read(expert, task.sources[expert], 0, size).float()
    told = base.to(torch.float32, copy=True)
    told[:size] = whole
    told[apart] = base[apart].float()
    return whole, told, whole[apart[:size]].to(base.dtype)


def mean_of_tables(tables: Tables, read: Callable[[str], Tensor]) -> Tensor:
    """The bundle's table, in float32, of whole ones: expert -> its own."""
    mean = None
    for expert, size in tables.sizes.items():
        rows = read(expert).float()
        mean = mean or _Mean(tables.size, rows.shape[1:])
        counts = torch.ones(size, dtype=torch.bool)
        counts[tables.own_rows(expert)] = False
        mean.add(rows, counts)
    assert mean is not None, "a bundle holds an expert"
    return mean.of_rows()


class _Mean:
    """Of the rows of one slab. Where all of a row are equal it is that row, to the bit."""

    def __init__(self, rows: int, shape: Sequence[int]) -> None:
        self._total = torch.zeros(rows, *shape)
        self._first = torch.zeros(rows, *shape)
        self._count = torch.zeros(rows, *[1] * len(shape))
        self._equal = torch.ones(rows, dtype=torch.bool)

    def add(self, rows: Tensor, counts: Tensor) -> None:
        """One expert's. rows [n, ...], those of the slab's beginning; counts: bool [n], which of them have a part."""
        places = counts.nonzero().squeeze(1)
        part = rows[places]
        new = self._count[places].flatten() == 0
        self._first[places[new]] = part[new]
        self._equal[places] &= (self._first[places] == part).reshape(len(places), -1).all(dim=1)
        self._total[places] += part
        self._count[places] += 1

    def of_rows(self) -> Tensor:
        """[rows, ...]"""
        return torch.where(self._equal.view_as(self._count), self._first, self._total / self._count)


def _tables(task: TensorTask) -> Tables:
    assert task.tables is not None, f"{task.name} is a table"
    return task.tables


def _is_own(task: TensorTask, expert: str) -> Tensor:
    """bool [rows of the bundle's]"""
    apart = torch.zeros(task.shape[0], dtype=torch.bool)
    apart[_tables(task).own_rows(expert)] = True
    return apart
