"""Add an expert to a bundle, or take one out, without touching or reading again what is there.

A new expert's residual is taken against the base as it stands. A fresh merge would move the base a little towards the
new expert; how much that would gain is estimated on a sample of the layers, with the old experts as the bundle holds
them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.alignment import Alignment, write_alignment
from ..bundle.bundle import Bundle
from ..bundle.files import FileEntry, check_free_space, raw_bytes
from ..bundle.write import ties, write_manifest, write_stats
from ..errors import BundleError, DiskSpaceError, RecipeError
from ..host import DTYPES
from ..method.dense import residual_of, unsaid
from ..method.nearest import nearest
from ..method.weights import Weights
from ..naming import check_expert_name
from ..recipe.lines import as_source
from ..recipe.source import Source
from ..sources.checkpoint import Checkpoint
from ..sources.opening import open_source
from ..sources.persona import Group, Persona, differing, persona_of
from .adapters import adapter_over, emit_adapter
from .align import aligned_to_bundle
from .calibration import Calibration
from .change import alone_with, changing, move_in
from .compress import (
    Settings,
    compress_against,
    compress_table,
    give_table,
)
from .executor import settings_of
from .finish import finish_expert
from .frame import check_settings, expert_of, frame_of_bundle, table_rows_in
from .inheritance import hand_over
from .journal import Note, Staging
from .layout import layout_of_experts
from .measure import frobenius_norm, stats_line
from .outcome import TensorReport
from .personas import store_persona
from .precision import check_not_rounded, with_dtypes
from .reading import Read, check_copy, checked_digest, reader_of
from .records import expert_record, kept_rows, numbers_in, own_rows_of, ranks_of, ratios_of, scales_of
from .tables import Emit
from .treatment import TensorTask, tasks_for
from .vocabulary import added_tables, numbers_of
from .whole import digest_of_rows, distance_from, emit_difference, emit_own

# An expert's tensors -> what counts of its residuals, while it is open.
Calibrate = Callable[[Sequence[TensorTask]], AbstractContextManager[Calibration]]
SAMPLED_LAYERS = 12
# A relative error that is the rounding of float32 alone.
EXACT = 1e-6


@dataclass(frozen=True)
class Added:
    """What adding an expert gave.

    Attributes:
        bundle: the bundle, with the new expert.
        relative_error: mean relative error of the new expert's sampled layers, against the base as it stands.
        fresh_relative_error: the same if all experts were merged anew (estimated).
        scale_ratio_range: smallest and largest rho of the new expert.
        persona: in what it differs from the bundle beside its weights, and has its own.
        note: what a user should hear of; empty: nothing.
    """

    bundle: Bundle
    relative_error: float
    fresh_relative_error: float
    scale_ratio_range: tuple[float, float]
    persona: tuple[Group, ...] = ()
    note: str = ""


def add_expert(
    bundle: Bundle | str | Path,
    name: str,
    source: Source | Mapping[str, Any] | str | Path,
    *,
    base: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    calibrate: Calibrate | None = None,
) -> Added:
    """Adds an expert against the bundle's base as it stands.

    Args:
        base: the model under a PEFT adapter; by default the one that the adapter's own configuration names.
        calibrate: sees what counts of its residuals, tensors given.
        progress: called with (tensors done, tensors in all, tensor) after every tensor.

    Raises:
        RecipeError: an unsafe name. BundleError: the name is taken. SourceError: the checkpoint does not fit.
        LockedError: another process is writing to the bundle.
    """
    path = Bundle.open(bundle).path
    try:
        check_expert_name(name)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    source = as_source(source, name)
    with alone_with(path) as bundle:
        if name.casefold() in {expert.casefold() for expert in bundle.experts}:
            raise BundleError(f"{path}: already holds an expert {name!r}; remove it first or choose another name")
        checkpoint = open_source(source.model_copy(update={"base": base}) if base else source)
        frame, trust = frame_of_bundle(bundle), trust_remote_code
        expert = expert_of(name, checkpoint, trust_remote_code=trust, frame=frame)
        checkpoint = expert.checkpoint
        check_settings(frame, expert, trust_remote_code=trust)
        settings = settings_of(bundle.manifest.method, DTYPES[bundle.manifest.dtype], device)
        persona = persona_of(checkpoint)
        groups = differing(bundle.persona(), persona)
        rows = expert.table_rows, table_rows_in(frame, expert)
        tables, unread = added_tables(bundle, name, persona, groups, rows, trust_remote_code=trust)
        tasks = tasks_for(frame, [expert], bundle.manifest.method, tables)
        stored = [record.dtype for record in bundle.manifest.experts.values()]
        check_not_rounded(name, checkpoint, tasks, settings.dtype, stored)
        tasks = with_dtypes(tasks, {name: checkpoint}, settings.dtype)
        checkpoint, alignment = aligned_to_bundle(bundle, checkpoint, tasks, settings.device)
        if calibrate and alignment:
            raise RecipeError(
                "calibration: is not there for experts that are aligned, as this bundle's are; leave it out"
            )
        check_free_space(path, sum(task.expert_bytes(settings.dtype, settings.code, name) for task in tasks))
        layout = layout_of_experts([name], tasks, settings.code)
        with calibrate(tasks) if calibrate else nullcontext() as seen, changing(bundle, name) as work:
            staging = Staging(work, layout)
            for index, task in enumerate(tasks):
                weights = seen.of(task).get(name) if seen else None
                staging.finish(functools.partial(_add_tensor, bundle, checkpoint, task, settings, weights))
                if progress:
                    progress(index + 1, len(tasks), task.name)
            notes = staging.notes
            files = _finish(
                staging, bundle, name, scales_of(name, tasks, notes), numbers_of(own_rows_of(name, tasks, notes))
            )
            files |= _store(staging.bundle, bundle, name, persona, groups, alignment)
            move_in(staging.bundle, bundle, name)
            lines = [line.to_json() for note in notes for line in note.stats]
            write_stats(path, [*bundle.stats(), *lines])
            record = expert_record(name, checkpoint, tasks, notes, groups)
            other_rows = record.vocabulary or record.rows
            tables_there = {task.name for task in tasks if task.tables and other_rows}
            ratios, ranks = ratios_of(notes), ranks_of(name, tasks, notes)
            pairs = zip(tasks, notes, strict=True)
            few = {task.name: kept[name] for task, note in pairs if name in (kept := kept_rows(note))}
            manifest = bundle.manifest.with_expert(
                name, record, files=files, ratios=ratios, tables=tables_there, ranks=ranks, rows=few,
                numbers=numbers_in(name, tasks, notes, settings.code), notes=seen.notes if seen else (),
            )  # fmt: skip
            write_manifest(path, manifest.checked().to_json())
        return replace(_assess(Bundle.open(path), name, checkpoint, tasks, settings, notes), note=unread)


def remove_expert(bundle: Bundle | str | Path, name: str) -> Bundle:
    """Takes an expert out. The base stays as it is, and who had its factors too inherits them, so the other experts do
    not change by a bit.

    Raises:
        BundleError: unknown expert, or the last one. LockedError: another process is writing to the bundle.
    """
    path = Bundle.open(bundle).path
    with alone_with(path) as bundle:
        bundle.expert_folder(name)
        if len(bundle.experts) == 1:
            raise BundleError(f"{path}: {name!r} is the only expert left; delete the bundle instead")
        lines = [line for line in bundle.stats() if line["expert"] != name]
        with changing(bundle, name):
            files = hand_over(bundle, name)
            write_manifest(path, bundle.manifest.without_expert(name, files).checked().to_json())
            with suppress(DiskSpaceError):  # the expert is out; lines of one that is not there are not read
                write_stats(path, lines)
        return Bundle.open(path)


def _add_tensor(
    bundle: Bundle,
    checkpoint: Checkpoint,
    task: TensorTask,
    settings: Settings,
    weights: Weights | None,
    emit: Emit,
) -> TensorReport:
    [(name, source)] = task.sources.items()
    report, read, settings = TensorReport(), reader_of({name: checkpoint}), settings.of(task)
    with torch.no_grad():
        if task.treatment == "copy":
            raw = checkpoint.read(source)
            check_copy(raw, bundle.base_tensor(task.name), name, source)
            report.digests[name] = hashlib.sha256(raw_bytes(raw)).hexdigest()
        elif task.against_base and task.tables is None:
            raw = checkpoint.read(source)
            report.digests[name] = checked_digest(raw, settings.dtype, name, source)
            base = bundle.base_tensor(task.name)
            over = adapter_over(task, checkpoint, source, base)
            if over:
                emit_adapter(task, name, over, over.base.read(source), base, settings, emit, report)
            else:
                _add_linear(bundle, name, task, raw, base, settings, emit, report, weights)
        else:
            report.digests[name] = digest_of_rows(task, name, settings.dtype, read)
            if task.tables is not None and task.against_base:
                compress_table(task, name, bundle.base_tensor(task.name), settings, read, emit, report)
                return report
            if task.tables is not None:
                give_table(task, name, bundle.base_tensor(task.name), read, emit, report)
                return report
            _add_whole(bundle, task, settings, read, emit, report)
    return report


def _add_whole(
    bundle: Bundle, task: TensorTask, settings: Settings, read: Read, emit: Emit, report: TensorReport
) -> None:
    """What an expert that comes later keeps of a tensor without residuals, and how far an averaged table is from it."""
    [name] = task.sources
    distance = distance_from(task, name, settings.dtype, read, _rows_of_base(bundle))
    if task.treatment == "average" and task.is_table:
        report.stats.append(stats_line(task, name, (distance.norm, distance.norm), 1.0, distance.loss()))
    if task.treatment != "keep" or not bool(distance.changed.any()):
        return
    if task.as_difference:
        emit_difference(task, name, bundle.base_tensor(task.name), read, emit)
    else:
        emit_own(task, name, settings.dtype, distance.changed if task.is_table else None, read, emit)


def _rows_of_base(bundle: Bundle) -> Read:
    read = reader_of({"": bundle.base})
    return lambda _, tensor, start, stop: read("", tensor, start, stop)


def _add_linear(
    bundle: Bundle,
    name: str,
    task: TensorTask,
    raw: Tensor,
    base: Tensor,
    settings: Settings,
    emit: Emit,
    report: TensorReport,
    weights: Weights | None,
) -> None:
    weight = raw.to(settings.device, torch.float32, copy=True)
    base = base.to(settings.device, torch.float32)
    scale, mean_scale = frobenius_norm(weight), bundle.layers[task.name].mean_scale
    scales = scale, scale if mean_scale is None else mean_scale  # of tables that differ all ratios are 1
    compress_against(task, name, weight, base, scales, settings, emit, report, weights=weights)


def _finish(
    staging: Staging, bundle: Bundle, name: str, scales: Mapping[str, float], rows: Sequence[int]
) -> dict[str, FileEntry]:
    layers, tied = list(bundle.layers.values()), bundle.manifest.tied_embedding
    return finish_expert(staging, name, bundle.base, layers, scales, code=bundle.code, tied_embedding=tied, rows=rows)


def _store(
    folder: Path,
    bundle: Bundle,
    name: str,
    persona: Persona,
    groups: tuple[Group, ...],
    alignment: Alignment | None,
) -> dict[str, FileEntry]:
    """What the expert has of its own beside its weights; Python files only where the bundle has some."""
    files = write_alignment(folder, name, alignment) if alignment else {}
    tied = ties(bundle.persona().config)
    code = any(file.endswith(".py") for file in bundle.manifest.files)
    return files | store_persona(folder, name, persona, groups, dtype=bundle.manifest.dtype, tied=tied, code=code)


def _assess(
    bundle: Bundle,
    name: str,
    checkpoint: Checkpoint,
    tasks: Sequence[TensorTask],
    settings: Settings,
    notes: Sequence[Note],
) -> Added:
    errors = {line.tensor: line.relative_error for note in notes for line in note.stats}
    linear = [task for task in tasks if task.record.role == "linear" and task.treatment == "low_rank"]
    sample = linear[:: max(1, len(linear) // SAMPLED_LAYERS)][:SAMPLED_LAYERS]
    # What is exact as it is has nothing to gain.
    inexact = [task for task in sample if errors[task.name] > EXACT]
    fresh = [_fresh_error(bundle, name, checkpoint, task, settings) for task in inexact]
    ratios = list(bundle.scales(name).values()) or [1.0]
    return Added(
        bundle,
        relative_error=sum(errors[task.name] for task in sample) / max(1, len(sample)),
        fresh_relative_error=sum(fresh) / max(1, len(sample)),
        scale_ratio_range=(min(ratios), max(ratios)),
        persona=bundle.manifest.experts[name].persona,
    )


def _fresh_error(bundle: Bundle, name: str, checkpoint: Checkpoint, task: TensorTask, settings: Settings) -> float:
    """The new expert's relative error in one layer, had it been in the average from the start."""
    weight = checkpoint.read(task.sources[name]).to(settings.device, torch.float32)
    norm = float(weight.norm())
    if not norm:
        return 0.0
    average = weight / norm
    for other in bundle.experts:
        if other != name:
            dense = bundle.reconstruct(other, task.name).to(settings.device)
            average += dense / dense.norm()
    residual = residual_of(weight.clone(), average, norm / len(bundle.experts))
    matrix = residual.T if task.record.transposed else residual
    room = settings.code.bytes(*task.matrix_shape, task.rank)
    b, a = settings.factorise(matrix, task.rank, settings.seed)
    code, coded = nearest(settings.code, settings.dtype, b, a, room)
    return float(unsaid(matrix, *code.decode(coded, *matrix.shape)).norm()) / norm
