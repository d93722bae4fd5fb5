"""Compress one tensor of N experts: the shared average, and what every expert has beyond it.

The method of the published system: s_i = ||W_i||_F, W_avg = mean of W_i / s_i, and a rank-r RSVD of every residual. The
average is stored as W̄ = s̄ W_avg with s̄ the mean of the s_i, and every residual is taken against W̄ *as stored*, after
rounding, with the ratio rho_i = s_i / s̄ as stored: R_i = W_i - rho_i W̄. What the base loses in rounding, the residuals
give back.

Holds one expert's linear weight at a time, whatever the number of experts, and some rows of other tensors. Knows no
files: it is given a function that reads and one that takes what is made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ..method.code import Code
from ..method.dense import residual_of, unsaid
from ..method.nearest import Stored, nearest
from ..method.rsvd import numerical_rank, sketch_seed
from ..method.weights import Weights, joined
from .measure import Loss, frobenius_norm, loss_of, stats_line
from .outcome import TensorReport, twin_of
from .reading import Read, check_stored, checked_digest
from .tables import Emit, emit_table, merge_table, split_table
from .treatment import TensorTask, adapter_key
from .whole import copy, keep_or_average

# One expert has another's factors where they leave at most so much more of its residual unsaid than its own would.
NEAR = 1.01


@dataclass(frozen=True)
class Settings:
    """How to compress; the part of a recipe that the arithmetic needs."""

    dtype: torch.dtype
    code: Code
    device: torch.device
    per_expert_scale: bool
    seed: int
    n_oversamples: int
    n_iter: int

    def of(self, task: TensorTask) -> Settings:
        """These, for one tensor: whole tensors in its own dtype, factors in the bundle's."""
        return replace(self, dtype=task.dtype) if task.dtype else self

    def factorise(self, matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
        """Factors of a residual, as the code wants them."""
        return self.code.factorise(matrix, rank, n_oversamples=self.n_oversamples, n_iter=self.n_iter, seed=seed)


@dataclass(frozen=True)
class Lent:
    """What the first of two experts has beyond their average: the second has it too, up to a scale.

    Attributes:
        b, a: its factors as they will be read.
        ratio: its rho.
        error: ||R - B A|| of its own residual.
    """

    expert: str
    b: Tensor
    a: Tensor
    ratio: float
    error: float


def compress_tensor(
    task: TensorTask, settings: Settings, read: Read, emit: Emit, weights: Mapping[str, Weights] = MappingProxyType({})
) -> TensorReport:
    """Does one task of a plan.

    Args:
        weights: expert -> what counts of its residual; all alike where nothing is said.

    Raises:
        SourceError: a value is not finite, or what is made of the values is too large; names expert and tensor.
    """
    report = TensorReport()
    settings = settings.of(task)
    if task.treatment == "copy":
        return copy(task, read, emit, report)
    if task.tables is not None:
        return _merge_table(task, settings, read, emit, report)
    if not task.against_base:
        return keep_or_average(task, settings.dtype, read, emit, report)
    return _compress_linear(task, settings, read, emit, report, weights)


def _compress_linear(
    task: TensorTask,
    settings: Settings,
    read: Read,
    emit: Emit,
    report: TensorReport,
    weights: Mapping[str, Weights],
) -> TensorReport:
    experts = list(task.sources)
    norms: dict[str, float] = {}
    total = torch.zeros(task.shape, dtype=torch.float32, device=settings.device)
    for expert in experts:
        weight = _read_matrix(task, expert, settings, read, report)
        norms[expert] = frobenius_norm(weight)
        total.add_(weight, alpha=1.0 / norms[expert] if norms[expert] else 0.0)
    mean_scale = sum(norms.values()) / len(experts)
    if len(set(report.digests.values())) == 1:
        return _shared_by_all(task, settings, read, emit, report, mean_scale)
    base = total.mul_(mean_scale / len(experts)).to(settings.dtype)
    check_stored(base, task.name, "the experts' average")
    emit(None, task.name, base)
    base32 = base.float()
    del total, base
    lent: Lent | None = None
    if weights and len(experts) == 2:  # which have one residual between them
        weights = dict.fromkeys(experts, joined(list(weights.values())))
    # PEFT reads an expert's published factors where they lie, and would answer without those in another's file.
    shares = task.treatment == "full" or not settings.code.peft_readable
    for expert in experts:
        if shares and (twin := twin_of(expert, report.digests)) is not None:
            report.repeat(twin, expert)
            continue
        began = time.perf_counter()
        weight = _read_matrix(task, expert, settings, read)
        scales = norms[expert], mean_scale
        counts = weights.get(expert)
        lent = compress_against(task, expert, weight, base32, scales, settings, emit, report, lent, counts)
        lent = lent if len(experts) == 2 else None
        report.stats[-1] = replace(report.stats[-1], seconds=round(time.perf_counter() - began, 4))
    return report


def compress_against(
    task: TensorTask,
    expert: str,
    weight: Tensor,
    base: Tensor,
    scales: tuple[float, float],
    settings: Settings,
    emit: Emit,
    report: TensorReport,
    lent: Lent | None = None,
    weights: Weights | None = None,
) -> Lent | None:
    """One expert's linear weight against the base as stored: its residual, its ratio, its line of statistics.

    Args:
        weight, base: as for `compress_residual`.
        scales: s_i of this expert and s̄ of the base.
        lent: what the other one of two experts has beyond their average.
        weights: what counts of the residual.

    Returns:
        What another one could have of its factors.
    """
    scale, mean_scale = scales
    scaled = settings.per_expert_scale and mean_scale and task.base == "average"
    ratio = float(np.float32(scale / mean_scale)) if scaled else 1.0
    loss, made = compress_residual(task, expert, weight, base, ratio, settings, emit, lent, weights)
    if lent and made is lent:
        report.borrowed[expert] = lent.expert, -ratio / lent.ratio
    if task.treatment != "full" and task.base == "average":
        report.scales[expert] = ratio
    report.stats.append(stats_line(task, expert, scales, ratio, loss))
    return made


def compress_residual(
    task: TensorTask,
    expert: str,
    weight: Tensor,
    base: Tensor,
    ratio: float,
    settings: Settings,
    emit: Emit,
    lent: Lent | None = None,
    weights: Weights | None = None,
) -> tuple[Loss, Lent | None]:
    """Stores what `weight` has beyond `ratio * base`, and measures what was lost.

    Args:
        weight: [out, in] (or [in, out] for a transposed record), float32; overwritten.
        base: the average as stored, float32, same shape.
        lent, weights: as for `compress_against`.

    Returns:
        The loss; and the factors that the expert has now, `lent` itself where it has these.
    """
    norm = frobenius_norm(weight)
    if task.treatment == "full":
        stored = weight.to(settings.dtype)
        emit(expert, adapter_key(task), stored)
        residual_norm = frobenius_norm(residual_of(weight.clone(), base, ratio))
        error = frobenius_norm(weight.sub_(stored.float()))
        return loss_of(0, norm, residual_norm, error), None
    residual = residual_of(weight, base, ratio)
    residual_norm = error = frobenius_norm(residual)
    found, made = None, None
    if task.treatment == "low_rank" and residual_norm:
        matrix = residual.T if task.record.transposed else residual  # [out, in]
        if lent and (shared := _error_with(lent, matrix, ratio, norm)) is not None:
            return loss_of(len(lent.a), norm, residual_norm, shared), lent
        found = _found(task, expert, matrix, norm, settings, weights)
        if weights and (found is None or found.rank < task.rank or not found.error < residual_norm):
            # All of it fits the rank, and is exact as it is; or what counts is too little of it.
            found = _found(task, expert, matrix, norm, settings, None)
    if found:
        for suffix, part in found.stored.items():
            check_stored(part, task.name, f"the residual of expert {expert!r}")
            emit(expert, adapter_key(task, suffix), part)
        error, made = found.error, Lent(expert, found.b, found.a, ratio, found.error)
    return loss_of(len(found.a) if found else 0, norm, residual_norm, error), made


@dataclass(frozen=True)
class _Found:
    """Factors of a residual: as they are stored, as they will be read, and ||R - B A||.

    Attributes:
        rank: as many of its directions are more than rounding, at most those that were asked for.
    """

    stored: Stored
    b: Tensor
    a: Tensor
    error: float
    rank: int


def _found(
    task: TensorTask, expert: str, matrix: Tensor, norm: float, settings: Settings, weights: Weights | None
) -> _Found | None:
    """Of a residual [out, in] of a weight with this norm; None where it is rounding alone."""
    seed = sketch_seed(settings.seed, task.name, expert)
    b, a = settings.factorise(weights.weighted(matrix) if weights else matrix, task.rank, seed)
    rank = numerical_rank(torch.linalg.vector_norm(a, dim=1), norm, task.matrix_shape)
    if not rank:
        return None
    room = settings.code.bytes(*task.matrix_shape, task.rank)
    code, stored = nearest(settings.code, settings.dtype, b[:, :rank], a[:rank], room, weights)
    b, a = code.decode(stored, *matrix.shape)
    return _Found(stored, b, a, frobenius_norm(unsaid(matrix.clone() if weights else matrix, b, a)), rank)


def _error_with(lent: Lent, residual: Tensor, ratio: float, norm: float) -> float | None:
    """||R - B A|| of the second of two experts with the first's factors; None where its own would be nearer.

    R_2 = W_2 - rho_2 W̄ is -(rho_2 / rho_1) R_1 if W̄ is the two's average to the last bit. What that lost in rounding is
    in both with one sign: in float32 nothing, in 16 bits as much as a small residual, whose factors say a part of it.
    """
    if not lent.ratio:
        return None
    times = ratio / lent.ratio
    error = frobenius_norm(residual.addmm(lent.b, lent.a, alpha=times))
    allowed = NEAR * times * lent.error + torch.finfo(torch.float32).eps * norm
    return error if error <= allowed else None


def _merge_table(task: TensorTask, settings: Settings, read: Read, emit: Emit, report: TensorReport) -> TensorReport:
    def give(expert: str, base: Tensor) -> None:
        if task.against_base:
            compress_table(task, expert, base, settings, read, emit, report)
        else:
            give_table(task, expert, base, read, emit, report)

    report.digests = merge_table(task, settings.dtype, read, emit, give)
    mean = sum(line.scale for line in report.stats) / max(1, len(report.stats))
    report.stats = [replace(line, mean_scale=mean) for line in report.stats]
    return report


def give_table(task: TensorTask, expert: str, base: Tensor, read: Read, emit: Emit, report: TensorReport) -> None:
    """One expert's table without residuals where vocabularies differ, and what an averaged one lost.

    Args:
        base: the bundle's as stored.
    """
    emit_table(task, expert, base, read, emit)
    if task.treatment == "average" and task.is_table:
        whole, told, _ = split_table(task, expert, base, read)
        scale, lost = frobenius_norm(whole), frobenius_norm(told.sub_(base.float()))
        report.stats.append(stats_line(task, expert, (scale, scale), 1.0, loss_of(0, scale, lost, lost)))


def compress_table(
    task: TensorTask, expert: str, base: Tensor, settings: Settings, read: Read, emit: Emit, report: TensorReport
) -> None:
    """One expert's table where vocabularies differ: the residual of the rows that stand for the bundle's tokens, with
    the ratio 1, and its own rows as they are. What it lost is counted over its own table, at most.

    Args:
        base: the bundle's as stored.
    """
    whole, told, own = split_table(task, expert, base, read)
    if len(own):
        emit(expert, adapter_key(task), own)
    scale, told_scale = frobenius_norm(whole), frobenius_norm(told)
    told, base = told.to(settings.device), base.to(settings.device, torch.float32)
    loss, _ = compress_residual(task, expert, told, base, 1.0, settings, emit)
    more = told_scale / scale if scale else 1.0
    loss = replace(loss, residual_norm=loss.residual_norm * more, relative_error=loss.relative_error * more)
    report.stats.append(stats_line(task, expert, (scale, scale), 1.0, loss))


def _shared_by_all(
    task: TensorTask, settings: Settings, read: Read, emit: Emit, report: TensorReport, scale: float
) -> TensorReport:
    """All experts agree to the bit: stored once, exactly."""
    first = next(iter(task.sources))
    weight = _read_matrix(task, first, settings, read)
    stored = weight.to(settings.dtype)
    emit(None, task.name, stored)
    error = frobenius_norm(weight - stored.float())
    for expert in task.sources:
        report.scales[expert] = 1.0
        loss = loss_of(0, frobenius_norm(weight), error, error)
        report.stats.append(stats_line(task, expert, (scale, scale), 1.0, loss, seconds=0.0))
    return report


def _read_matrix(
    task: TensorTask, expert: str, settings: Settings, read: Read, report: TensorReport | None = None
) -> Tensor:
    """One expert's matrix in float32 on the device. With a report, it is checked and hashed on the way."""
    raw = read(expert, task.sources[expert], 0, task.shape[0])
    if report is not None:
        report.digests[expert] = checked_digest(raw, settings.dtype, expert, task.sources[expert])
    weight = raw.to(device=settings.device, dtype=torch.float32)
    return weight.clone() if weight.data_ptr() == raw.data_ptr() else weight
