"""Compress one tensor of N experts: the shared average, and what every expert has beyond it.

The method of the published system: s_i = ||W_i||_F, W_avg = mean of W_i / s_i, and a rank-r RSVD of every residual. The
average is stored as W̄ = s̄ W_avg with s̄ the mean of the s_i, and every residual is taken against W̄ *as stored*, after
rounding, with the ratio rho_i = s_i / s̄ as stored: R_i = W_i - rho_i W̄. What the base loses in rounding, the residuals
give back.

Holds one expert's linear weight at a time, whatever the number of experts, and some rows of other tensors. Knows no
files: it is given a function that reads and one that takes what is made.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..bundle.files import Rows, raw_bytes, slabs
from ..bundle.stats import StatsLine
from ..method.code import Code
from ..method.dense import residual_of, unsaid
from ..method.rsvd import numerical_rank, sketch_seed
from .measure import Loss, frobenius_norm, loss_of, stats_line
from .reading import Read, check_copy, check_stored, check_values, checked_digest
from .tables import Emit, merge_table
from .treatment import TensorTask

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


@dataclass
class TensorReport:
    """What became of one tensor.

    Attributes:
        digests: expert -> SHA-256 of the source tensor's bytes.
        scales: expert -> rho_i (float32), for tensors that are stored against the base.
        stats: one line of merge_stats.jsonl an expert, for linear weights.
        borrowed: expert -> the one whose factors are its own too, and what they count for it.
    """

    digests: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    stats: list[StatsLine] = field(default_factory=list)
    borrowed: dict[str, tuple[str, float]] = field(default_factory=dict)


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


def compress_tensor(task: TensorTask, settings: Settings, read: Read, emit: Emit) -> TensorReport:
    """Does one task of a plan.

    Raises:
        SourceError: a value is not finite, or what is made of the values is too large; names expert and tensor.
    """
    report = TensorReport()
    settings = settings.of(task)
    if task.treatment == "copy":
        return _copy(task, read, emit, report)
    if task.tables is not None:
        report.digests = merge_table(task, settings.dtype, read, emit)
        return report
    if task.record.role != "linear":
        return _keep_or_average(task, settings, read, emit, report)
    return _compress_linear(task, settings, read, emit, report)


def adapter_key(task: TensorTask, suffix: str | None = None) -> str:
    """The key in an expert's adapter file, without PEFT's prefix."""
    return f"{task.record.module}.{suffix or task.record.parameter}"


def _compress_linear(
    task: TensorTask, settings: Settings, read: Read, emit: Emit, report: TensorReport
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
    for expert in experts:
        began = time.perf_counter()
        weight = _read_matrix(task, expert, settings, read)
        scales = norms[expert], mean_scale
        lent = compress_against(task, expert, weight, base32, scales, settings, emit, report, lent)
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
) -> Lent | None:
    """One expert's linear weight against the base as stored: its residual, its ratio, its line of statistics.

    Args:
        weight, base: as for `compress_residual`.
        scales: s_i of this expert and s̄ of the base.
        lent: what the other one of two experts has beyond their average.

    Returns:
        What another one could have of its factors.
    """
    scale, mean_scale = scales
    scaled = settings.per_expert_scale and mean_scale and task.base == "average"
    ratio = float(np.float32(scale / mean_scale)) if scaled else 1.0
    loss, made = compress_residual(task, expert, weight, base, ratio, settings, emit, lent)
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
) -> tuple[Loss, Lent | None]:
    """Stores what `weight` has beyond `ratio * base`, and measures what was lost.

    Args:
        weight: [out, in] (or [in, out] for a transposed record), float32; overwritten.
        base: the average as stored, float32, same shape.
        lent: as for `compress_against`.

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
    rank, made = 0, None
    if task.treatment == "low_rank" and residual_norm:
        matrix = residual.T if task.record.transposed else residual  # [out, in]
        if lent and (shared := _error_with(lent, matrix, ratio, norm)) is not None:
            return loss_of(len(lent.a), norm, residual_norm, shared), lent
        seed = sketch_seed(settings.seed, task.name, expert)
        b, a = settings.factorise(matrix, task.rank, seed)
        rank = numerical_rank(torch.linalg.vector_norm(a, dim=1), norm, task.matrix_shape)
    if rank:
        b, a = b[:, :rank], a[:rank]
        coded = settings.code.encode(b, a)
        for suffix, part in coded.items():
            check_stored(part, task.name, f"the residual of expert {expert!r}")
            emit(expert, adapter_key(task, suffix), part)
        b, a = settings.code.decode(coded, *matrix.shape)
        error = frobenius_norm(unsaid(matrix, b, a))
        made = Lent(expert, b, a, ratio, error)
    return loss_of(rank, norm, residual_norm, error), made


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


def _keep_or_average(
    task: TensorTask, settings: Settings, read: Read, emit: Emit, report: TensorReport
) -> TensorReport:
    experts = list(task.sources)
    report.digests = {expert: digest_of_rows(task, expert, settings, read) for expert in experts}
    agreed = len(set(report.digests.values())) == 1
    # The mean of equal numbers may differ from them in the last bit.
    base = stored_rows(task, experts[0], settings, read) if agreed else _mean_rows(task, settings, read)
    emit(None, task.name, base)
    for expert in experts if task.treatment == "keep" and not agreed else ():
        if task.as_difference:
            mean = torch.cat(list(_mean_rows(task, settings, read).parts))
            emit_difference(task, expert, mean, read, emit)
        else:
            emit(expert, adapter_key(task), stored_rows(task, expert, settings, read))
    return report


def emit_difference(task: TensorTask, expert: str, base: Tensor, read: Read, emit: Emit) -> None:
    """The bias of a compressed layer travels as a difference from the average as stored, where PEFT looks for it."""
    bias = read(expert, task.sources[expert], 0, task.shape[0])
    emit(expert, adapter_key(task, "lora_B.bias"), bias.float() - base.float())


def digest_of_rows(task: TensorTask, expert: str, settings: Settings, read: Read) -> str:
    """SHA-256 of an expert's whole tensor, its values checked on the way."""
    digest = hashlib.sha256()
    for start, stop in slabs(task.shape):
        rows = read(expert, task.sources[expert], start, stop)
        check_values(rows, settings.dtype, expert, task.sources[expert])
        digest.update(raw_bytes(rows))
    return digest.hexdigest()


def stored_rows(task: TensorTask, expert: str, settings: Settings, read: Read) -> Rows:
    """An expert's own tensor as it is stored."""
    parts = (read(expert, task.sources[expert], *rows).to(settings.dtype) for rows in slabs(task.shape))
    return Rows(settings.dtype, task.shape, parts)


def _mean_rows(task: TensorTask, settings: Settings, read: Read) -> Rows:
    def parts() -> Iterator[Tensor]:
        for start, stop in slabs(task.shape):
            total = torch.zeros(())
            for number, (expert, source) in enumerate(task.sources.items()):
                rows = read(expert, source, start, stop)
                total = total.add_(rows.float()) if number else rows.to(torch.float32, copy=True)
            mean = total.div_(len(task.sources)).to(settings.dtype)
            check_stored(mean, task.name, "the experts' average")
            yield mean

    return Rows(settings.dtype, task.shape, parts())


def _copy(task: TensorTask, read: Read, emit: Emit, report: TensorReport) -> TensorReport:
    first: Tensor | None = None
    for expert, source in task.sources.items():
        whole = read(expert, source, 0, task.shape[0] if task.shape else 1)
        report.digests[expert] = hashlib.sha256(raw_bytes(whole)).hexdigest()
        if first is None:
            first = whole
            emit(None, task.name, whole)
        check_copy(whole, first, expert, source)
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
