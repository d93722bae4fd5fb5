"""Compress one tensor of N experts: the shared average, and what every expert has beyond it.

The method of the published system: s_i = ||W_i||_F, W_avg = mean of W_i / s_i, and a rank-r RSVD of every residual. The
average is stored as W̄ = s̄ W_avg with s̄ the mean of the s_i, and every residual is taken against W̄ *as stored*, after
rounding, with the ratio rho_i = s_i / s̄ as stored: R_i = W_i - rho_i W̄. What the base loses in rounding, the residuals
give back.

Holds one expert's tensor at a time, whatever the number of experts. Knows no files: it is given a function that
reads and one that takes what is made.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import SourceError
from ..host import dtype_name
from ..method.codes import Code
from ..method.rsvd import rsvd, sketch_seed
from .plan import TensorTask

# read(expert, tensor name, start row, stop row) -> rows on the CPU in the stored dtype
Read = Callable[[str, str, int, int], Tensor]
# emit(owner, key, tensor): owner None is the base, otherwise an expert's name; key as in the owner's file
Emit = Callable[[str | None, str, Tensor], None]

# Tensors that are not linear weights are read in slabs of about this many numbers: a vocabulary of 128,256 x 4,096
# in float32 would be 2 GB.
SLAB_NUMEL = 16_777_216


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


@dataclass
class TensorReport:
    """What became of one tensor.

    Attributes:
        digests: expert -> SHA-256 of the source tensor's bytes.
        scales: expert -> rho_i (float32), for tensors that are stored against the base.
        stats: one dict an expert, a line of merge_stats.jsonl.
    """

    digests: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    stats: list[dict[str, object]] = field(default_factory=list)


def compress_tensor(task: TensorTask, settings: Settings, read: Read, emit: Emit) -> TensorReport:
    """Does one task of a plan.

    Raises:
        SourceError: a value is not finite; names expert and tensor.
    """
    report = TensorReport()
    if task.treatment == "copy":
        return _copy(task, read, emit, report)
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
    emit(None, task.name, base)
    base32 = base.float()
    del total, base
    for expert in experts:
        began = time.perf_counter()
        ratio = norms[expert] / mean_scale if settings.per_expert_scale and mean_scale else 1.0
        ratio = float(np.float32(ratio))
        weight = _read_matrix(task, expert, settings, read)
        stats = compress_residual(task, expert, weight, base32, ratio, settings, emit)
        if task.treatment != "full":
            report.scales[expert] = ratio
        report.stats.append(stats_line(task, expert, norms[expert], mean_scale, ratio, stats, began))
    return report


def compress_residual(
    task: TensorTask, expert: str, weight: Tensor, base: Tensor, ratio: float, settings: Settings, emit: Emit
) -> dict[str, float]:
    """Stores what `weight` has beyond `ratio * base`, and measures what was lost.

    Args:
        weight: [out, in] (or [in, out] for a transposed record), float32; overwritten.
        base: the average as stored, float32, same shape.

    Returns:
        residual_norm ||R|| / ||W||, energy_kept 1 - ||R - BA||² / ||R||², relative_error ||W - W'|| / ||W||.
    """
    norm = frobenius_norm(weight)
    if task.treatment == "full":
        stored = weight.to(settings.dtype)
        emit(expert, adapter_key(task), stored)
        residual_norm = frobenius_norm(weight.sub(base, alpha=ratio))
        error = frobenius_norm(weight.sub_(stored.float()))
        return _measures(norm, residual_norm, error)
    residual = weight.sub_(base, alpha=ratio)
    residual_norm = error = frobenius_norm(residual)
    if task.treatment == "low_rank" and residual_norm:
        matrix = residual.T if task.record.transposed else residual  # [out, in]
        seed = sketch_seed(settings.seed, task.name, expert)
        b, a = rsvd(matrix, task.rank, n_oversamples=settings.n_oversamples, n_iter=settings.n_iter, seed=seed)
        coded = settings.code.encode(b, a)
        for suffix, part in coded.items():
            emit(expert, adapter_key(task, suffix), part)
        b, a = settings.code.decode(coded, *matrix.shape)
        error = frobenius_norm(matrix.addmm_(b, a, alpha=-1.0))
    return _measures(norm, residual_norm, error)


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
        stats = _measures(frobenius_norm(weight), error, error)
        report.stats.append(stats_line(task, expert, scale, scale, 1.0, stats, time.perf_counter(), rank=0))
    return report


def _keep_or_average(
    task: TensorTask, settings: Settings, read: Read, emit: Emit, report: TensorReport
) -> TensorReport:
    experts = list(task.sources)
    hashes = {expert: hashlib.sha256() for expert in experts}
    mean = torch.empty(task.shape or (1,), dtype=settings.dtype)  # a number without dimensions is a row of one
    for start, stop in slabs(task.shape):
        total = None
        for expert in experts:
            rows = read(expert, task.sources[expert], start, stop)
            _check_values(rows, settings.dtype, expert, task.sources[expert])
            hashes[expert].update(_raw(rows))
            total = rows.float() if total is None else total.add_(rows.float())
        assert total is not None
        mean[start:stop] = total.div_(len(experts)).to(settings.dtype)
    report.digests = {expert: digest.hexdigest() for expert, digest in hashes.items()}
    agreed = len(set(report.digests.values())) == 1
    if agreed:  # the mean of equal numbers may differ from them in the last bit
        _read_into(mean, experts[0], task, read)
    emit(None, task.name, mean.view(task.shape))
    if task.treatment == "keep" and not agreed:
        _emit_own(task, mean, read, emit)
    return report


def _emit_own(task: TensorTask, mean: Tensor, read: Read, emit: Emit) -> None:
    """Every expert's own tensor. The bias of a compressed layer travels as a difference, where PEFT looks for it."""
    average = mean.float() if task.as_difference else None
    for expert in task.sources:
        if average is not None:
            own = read(expert, task.sources[expert], 0, task.shape[0])
            emit(expert, adapter_key(task, "lora_B.bias"), own.float() - average)
            continue
        own = torch.empty_like(mean)
        _read_into(own, expert, task, read)
        emit(expert, adapter_key(task), own.view(task.shape))


def _copy(task: TensorTask, read: Read, emit: Emit, report: TensorReport) -> TensorReport:
    for expert, source in task.sources.items():
        whole = read(expert, source, 0, task.shape[0] if task.shape else 1)
        report.digests[expert] = hashlib.sha256(_raw(whole)).hexdigest()
        if not report.digests.keys() - {expert}:
            emit(None, task.name, whole)
    first, *others = report.digests
    other = next((expert for expert in others if report.digests[expert] != report.digests[first]), None)
    if other:
        raise SourceError(
            f"experts {first!r} and {other!r} differ in tensor {task.name!r}, which their architecture does not know; "
            "a bundle cannot hold it for each of them"
        )
    return report


def _read_into(target: Tensor, expert: str, task: TensorTask, read: Read) -> None:
    for start, stop in slabs(task.shape):
        target[start:stop] = read(expert, task.sources[expert], start, stop).to(target.dtype)


def slabs(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) rows of a tensor, about SLAB_NUMEL numbers at a time; a number without dimensions is one row."""
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, SLAB_NUMEL // max(1, width))
    rows = shape[0] if shape else 1
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _read_matrix(
    task: TensorTask, expert: str, settings: Settings, read: Read, report: TensorReport | None = None
) -> Tensor:
    """One expert's matrix in float32 on the device. With a report, it is checked and hashed on the way."""
    raw = read(expert, task.sources[expert], 0, task.shape[0])
    if report is not None:
        read_checked(raw, settings.dtype, expert, task.sources[expert], report)
    weight = raw.to(device=settings.device, dtype=torch.float32)
    return weight.clone() if weight.data_ptr() == raw.data_ptr() else weight


def read_checked(raw: Tensor, dtype: torch.dtype, expert: str, tensor: str, report: TensorReport) -> Tensor:
    """The tensor itself, after its values were checked and its bytes hashed into the report."""
    report.digests[expert] = hashlib.sha256(_raw(raw)).hexdigest()
    _check_values(raw, dtype, expert, tensor)
    return raw


def _check_values(values: Tensor, dtype: torch.dtype, expert: str, tensor: str) -> None:
    """Refuses values that are not finite, or too large for the arithmetic (float32) or the bundle (`dtype`).

    The extremes say both in one pass: a NaN anywhere is the minimum and the maximum.
    """
    if not values.is_floating_point() or not values.numel():
        return
    low, high = torch.aminmax(values)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(values)).sum())
        raise SourceError(
            f"expert {expert!r}: tensor {tensor!r} holds {bad} NaN or infinite values; the checkpoint is damaged"
        )
    if largest > min(torch.finfo(dtype).max, torch.finfo(torch.float32).max):
        raise SourceError(
            f"expert {expert!r}: tensor {tensor!r} holds {largest:.3g}, too large for {dtype_name(dtype)}; "
            "say a wider `dtype:` in the recipe"
        )


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def frobenius_norm(matrix: Tensor) -> float:
    """||W||_F: every row in float32, the rows together in float64. Ten times as fast on a CPU as float64 throughout.

    Where squares may leave float32's range it is float64 throughout.
    """
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=-1).double()))
    if 1e-12 < norm < math.inf:
        return norm
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _measures(norm: float, residual: float, error: float) -> dict[str, float]:
    return {
        "residual_norm": residual / norm if norm else 0.0,
        "energy_kept": 1.0 - (error / residual) ** 2 if residual else 1.0,
        "relative_error": error / norm if norm else 0.0,
    }


def stats_line(
    task: TensorTask,
    expert: str,
    scale: float,
    mean_scale: float,
    ratio: float,
    stats: dict[str, float],
    began: float,
    rank: int | None = None,
) -> dict[str, object]:
    """A line of merge_stats.jsonl. `began` is a time.perf_counter(), 0 where no time was taken."""
    shared = rank == 0
    return {
        "tensor": task.name,
        "expert": expert,
        "module": task.record.module,
        "shape": list(task.matrix_shape),
        "rank": 0 if shared else task.rank,
        "storage": "average" if shared else task.treatment,
        "scale": scale,
        "mean_scale": mean_scale,
        "scale_ratio": ratio,
        **stats,
        "seconds": round(time.perf_counter() - began, 4) if began else None,
    }
