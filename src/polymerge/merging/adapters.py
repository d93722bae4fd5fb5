"""Stores experts that are adapters over one model: the model's own matrix, and every adapter's own factors beyond it.

W_i = W + B_i A_i with the adapter's scaling in B_i: nothing is factorised, rho is 1, and the factors stay in the
adapter's dtype. Which layers these are is `polymerge.merging.foundation`'s. Holds one matrix at a time. Knows no files:
what reads and what takes the result is given.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SourceError
from ..method.code import Code
from ..method.codes import code_of
from ..method.dense import dense
from ..sources.checkpoint import Checkpoint, OverBase
from .compress import Settings
from .measure import frobenius_norm, loss_of, stats_line
from .outcome import TensorReport
from .reading import Read, Sums, check_stored, check_values, checked_digest
from .tables import Emit
from .treatment import TensorTask, adapter_key


def compress_over_base(task: TensorTask, settings: Settings, read: Read, sums: Sums, emit: Emit) -> TensorReport:
    """Does one task whose base is the model under the experts' adapters.

    Raises:
        SourceError: a value is not finite or too large, or the adapters' bases differ after all.
    """
    report, settings = TensorReport(), settings.of(task)
    base = _base(task, sums)
    check_values(base, settings.dtype, next(iter(task.sources)), task.name)
    stored = base.to(settings.dtype)
    emit(None, task.name, stored)
    for expert, source in task.sources.items():
        raw = read(expert, source, 0, task.shape[0])
        report.digests[expert] = checked_digest(raw, settings.dtype, expert, source)
        over = sums(expert, source)
        assert over is not None, "the task says that all experts are sums"
        emit_adapter(task, expert, over, base, stored, settings, emit, report)
    return report


def emit_adapter(
    task: TensorTask,
    expert: str,
    over: OverBase,
    base: Tensor,
    stored: Tensor,
    settings: Settings,
    emit: Emit,
    report: TensorReport,
) -> None:
    """One adapter's factors over the base, and their line of statistics.

    Args:
        base, stored: the model's matrix, and as the bundle stores it.
    """
    base32 = base.to(settings.device, torch.float32)
    made = coded_adapter(over, settings.code)
    before = after = None
    if made is not None:
        (b, a), coded, code = made
        for suffix, part in coded.items():
            check_stored(part, task.name, f"the residual of expert {expert!r}")
            emit(expert, adapter_key(task, suffix), part)
        before = b.to(base32), a.to(base32)
        b, a = code.decode(coded, *task.matrix_shape)
        after = b.to(base32), a.to(base32)
    transposed = task.record.transposed
    weight = dense(base32, 1.0, before, transposed=transposed)
    norm, residual = frobenius_norm(weight), frobenius_norm(weight - base32)
    rebuilt = dense(stored.to(base32), 1.0, after, transposed=transposed)
    loss = loss_of(over.rank, norm, residual, frobenius_norm(weight.sub_(rebuilt)))
    scales = (norm, frobenius_norm(base32))
    # Their energy is that of the residual alone: what the base lost in rounding is no part of it.
    report.stats.append(stats_line(task, expert, scales, 1.0, replace(loss, energy_kept=max(loss.energy_kept, 0.0))))


def adapter_over(task: TensorTask, checkpoint: Checkpoint, source: str, stored: Tensor) -> OverBase | None:
    """A matrix as an adapter's over the very model that a bundle stores under its experts' adapters; None otherwise.

    Args:
        stored: the bundle's.
    """
    over = checkpoint.over_base(source) if task.base == "adapters" else None
    return over if over and torch.equal(over.base.read(source).to(stored.dtype), stored) else None


def coded_adapter(over: OverBase, code: Code) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor], Code] | None:
    """An adapter's factors B and A, the same as they are stored, and the code that they are stored in; None where it
    has none. Published factors stay in the adapter's dtype."""
    if over.factors is None:
        return None
    b, a = over.factors()
    its = code_of(code.name, over.dtype)
    return (b, a), its.encode(b.float(), a.float()), its


def _base(task: TensorTask, sums: Sums) -> Tensor:
    """The matrix under the adapters. Bases in other folders, which were told to be the same by samples, must be."""
    tensor, first = None, None
    for expert, source in task.sources.items():
        over = sums(expert, source)
        assert over is not None, "the task says that all experts are sums"
        if tensor is None or first is None:
            tensor, first = over.base.read(source), over.base
        elif over.base.folder.resolve() != first.folder.resolve() and not torch.equal(tensor, over.base.read(source)):
            raise SourceError(
                f"expert {expert!r}: tensor {source!r} of its base {over.base.label} is not the one of "
                f"{first.label}; say `adapters: average` in the recipe"
            )
    assert tensor is not None, "a bundle holds an expert"
    return tensor
