"""Tensors without residuals: one for all experts that agree, the mean, and what an expert keeps of its own.

Of a kept table an expert has the rows that are not the mean's, or the whole where that is hardly more; one that is
another expert's to the bit is stored once. Reads slabs and holds no tensor whole. Knows no files: what reads and what
takes the result is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..bundle.files import Rows, raw_bytes, slabs
from ..bundle.kept import ROW_NUMBERS, rows_are_smaller
from .measure import Distance, stats_line
from .outcome import TensorReport, twin_of
from .reading import Read, check_copy, check_stored, check_values
from .tables import Emit
from .treatment import TensorTask, adapter_key


def keep_or_average(task: TensorTask, dtype: torch.dtype, read: Read, emit: Emit, report: TensorReport) -> TensorReport:
    """Does one task whose tensor is kept or averaged.

    Args:
        dtype: what it is stored in.

    Raises:
        SourceError: a value is not finite or too large; names expert and tensor.
    """
    experts = list(task.sources)
    report.digests = {expert: digest_of_rows(task, expert, dtype, read) for expert in experts}
    if len(set(report.digests.values())) == 1:
        # The mean of equal numbers may differ from them in the last bit.
        emit(None, task.name, stored_rows(task, experts[0], dtype, read))
        return report
    distances = {expert: Distance(task.shape[0] if task.shape else 1) for expert in experts}
    measured = distances if task.is_table else {}
    emit(None, task.name, Rows(dtype, task.shape, _mean(task, dtype, read, measured)))
    if task.treatment == "average":
        _tell(task, measured, report)
    else:
        _keep(task, dtype, read, emit, measured, report)
    return report


def emit_difference(task: TensorTask, expert: str, base: Tensor, read: Read, emit: Emit) -> None:
    """The bias of a compressed layer travels as a difference from the average as stored, where PEFT looks for it."""
    bias = read(expert, task.sources[expert], 0, task.shape[0])
    emit(expert, adapter_key(task, "lora_B.bias"), bias.float() - base.float())


def emit_own(task: TensorTask, expert: str, dtype: torch.dtype, changed: Tensor | None, read: Read, emit: Emit) -> None:
    """An expert's own tensor: its rows that are not the average's, or the whole.

    Args:
        changed: bool [rows], which of a table these are; None for what is no table.
    """
    if changed is None or task.record.role != "embedding" or not rows_are_smaller(int(changed.sum()), len(changed)):
        emit(expert, adapter_key(task), stored_rows(task, expert, dtype, read))
        return
    source = task.sources[expert]
    parts = (read(expert, source, *place).to(dtype)[changed[slice(*place)]] for place in slabs(task.shape))
    numbers = changed.nonzero().squeeze(1).to(torch.int32)
    emit(expert, adapter_key(task), Rows(dtype, (len(numbers), *task.shape[1:]), parts))
    emit(expert, adapter_key(task) + ROW_NUMBERS, numbers)


def distance_from(task: TensorTask, expert: str, dtype: torch.dtype, read: Read, base: Read) -> Distance:
    """How far an expert's own tensor, as stored, is from a base's.

    Args:
        base: reads the base's rows, whoever's they are said to be.
    """
    distance = Distance(task.shape[0] if task.shape else 1)
    for place in slabs(task.shape):
        rows = read(expert, task.sources[expert], *place)
        distance.add(rows, rows.to(dtype), base(expert, task.name, *place).to(dtype), place)
    return distance


def digest_of_rows(task: TensorTask, expert: str, dtype: torch.dtype, read: Read) -> str:
    """SHA-256 of an expert's whole tensor, its values checked on the way."""
    digest = hashlib.sha256()
    for start, stop in slabs(task.shape):
        rows = read(expert, task.sources[expert], start, stop)
        check_values(rows, dtype, expert, task.sources[expert])
        digest.update(raw_bytes(rows))
    return digest.hexdigest()


def stored_rows(task: TensorTask, expert: str, dtype: torch.dtype, read: Read) -> Rows:
    """An expert's own tensor as it is stored."""
    parts = (read(expert, task.sources[expert], *rows).to(dtype) for rows in slabs(task.shape))
    return Rows(dtype, task.shape, parts)


def copy(task: TensorTask, read: Read, emit: Emit, report: TensorReport) -> TensorReport:
    """Does one task whose tensor the model does not know: all experts must have the same."""
    first: Tensor | None = None
    for expert, source in task.sources.items():
        whole = read(expert, source, 0, task.shape[0] if task.shape else 1)
        report.digests[expert] = hashlib.sha256(raw_bytes(whole)).hexdigest()
        if first is None:
            first = whole
            emit(None, task.name, whole)
        check_copy(whole, first, expert, source)
    return report


def _keep(
    task: TensorTask,
    dtype: torch.dtype,
    read: Read,
    emit: Emit,
    measured: dict[str, Distance],
    report: TensorReport,
) -> None:
    for expert in task.sources:
        if task.as_difference:
            mean = torch.cat(list(_mean(task, dtype, read, {})))
            emit_difference(task, expert, mean, read, emit)
        elif task.is_table and (twin := twin_of(expert, report.digests)) is not None:
            report.repeat(twin, expert)
        else:
            emit_own(task, expert, dtype, measured[expert].changed if measured else None, read, emit)


def _tell(task: TensorTask, measured: dict[str, Distance], report: TensorReport) -> None:
    """The lines of a table of which every expert has the average alone."""
    scales = [distance.norm for distance in measured.values()]
    for expert, distance in measured.items():
        line = stats_line(task, expert, (distance.norm, sum(scales) / len(scales)), 1.0, distance.loss())
        report.stats.append(line)


def _mean(task: TensorTask, dtype: torch.dtype, read: Read, measured: dict[str, Distance]) -> Iterator[Tensor]:
    """The experts' mean as stored, a slab at a time; of a row that all of them have it is that row.

    Args:
        measured: expert -> filled with how far its tensor is from the mean.
    """
    for place in slabs(task.shape):
        total = torch.zeros(())
        for number, (expert, source) in enumerate(task.sources.items()):
            rows = read(expert, source, *place)
            total = total.add_(rows.float()) if number else rows.to(torch.float32, copy=True)
        mean = total.div_(len(task.sources)).to(dtype)
        if measured:
            mean = _with_equal_rows(task, mean, read, place)
        check_stored(mean, task.name, "the experts' average")
        for expert, distance in measured.items():
            rows = read(expert, task.sources[expert], *place)
            distance.add(rows, rows.to(dtype), mean, place)
        yield mean


def _with_equal_rows(task: TensorTask, mean: Tensor, read: Read, place: Sequence[int]) -> Tensor:
    """A slab of the mean, with the very rows that all experts have alike."""
    first, *others = (read(expert, source, *place) for expert, source in task.sources.items())
    equal = torch.ones(len(first), dtype=torch.bool)
    for rows in others:
        equal &= (rows == first).reshape(len(first), -1).all(dim=1)
    mean[equal] = first[equal].to(mean.dtype)
    return mean
