"""Add an expert to a bundle, or take one out, without touching or reading again what is there.

A new expert's residual is taken against the base as it stands. A fresh merge would move the base a little towards the
new expert; how much that would gain is estimated on a sample of the layers, with the old experts as the bundle holds
them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bundle.bundle import Bundle
from ..bundle.files import FileEntry, Piece, check_free_space
from ..bundle.manifest import BundleLayer, ExpertRecord, Manifest
from ..bundle.peft import missing_siblings
from ..bundle.write import clear, write_expert, write_manifest, write_stats
from ..errors import BundleError, RecipeError, SourceError
from ..host import DTYPES, dtype_name, pick_device
from ..method.rsvd import factors_are_smaller, rank_for_rate, rsvd
from ..recipe.merge import Source, check_expert_name
from ..sources.checkpoint import Checkpoint
from ..sources.layers import LayerRecord, map_layers
from ..sources.opening import open_checkpoint
from .compress import Settings, TensorReport, compress_residual, frobenius_norm, read_checked, stats_line
from .journal import Staging, pieces_of
from .plan import TensorTask, Treatment, with_differences

SAMPLED_LAYERS = 12


@dataclass(frozen=True)
class Added:
    """What adding an expert gave.

    Attributes:
        bundle: the bundle, with the new expert.
        relative_error: mean relative error of the new expert's sampled layers, against the base as it stands.
        fresh_relative_error: the same if all experts were merged anew (estimated).
        scale_ratio_range: smallest and largest rho of the new expert.
    """

    bundle: Bundle
    relative_error: float
    fresh_relative_error: float
    scale_ratio_range: tuple[float, float]


def add_expert(
    bundle: Bundle | str | Path,
    name: str,
    source: Source | str | Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Added:
    """Adds an expert against the bundle's base as it stands.

    Args:
        progress: called with (tensors done, tensors in all, tensor) after every tensor.

    Raises:
        RecipeError: an unsafe name. BundleError: the name is taken. SourceError: the checkpoint does not fit.
    """
    bundle = Bundle.open(bundle)
    try:
        check_expert_name(name)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if name.casefold() in {expert.casefold() for expert in bundle.experts}:
        raise BundleError(f"{bundle.path}: already holds an expert {name!r}; remove it first or choose another name")
    checkpoint = open_checkpoint(source)
    tasks = _tasks(bundle, name, checkpoint, trust_remote_code=trust_remote_code)
    settings = _settings(bundle, device)
    check_free_space(bundle.path, 2 * sum(task.expert_bytes(settings.dtype, settings.code) for task in tasks))
    shutil.rmtree(bundle.path / "experts" / name, ignore_errors=True)  # left by a kill before the manifest was written
    staging = Staging(bundle.path / "experts" / name, {}, resume=False, overwrite=False)
    notes = []
    try:
        for index, task in enumerate(tasks):
            notes.append(_add_tensor(bundle, name, checkpoint, task, settings, staging, index))
            if progress:
                progress(index + 1, len(tasks), task.name)
        files = _write(staging, bundle, name, notes)
    except Exception:
        shutil.rmtree(staging.folder, ignore_errors=True)  # a second `add` starts again
        raise
    _commit(bundle, name, checkpoint, tasks, notes, files)
    return _assess(Bundle.open(bundle.path), name, checkpoint, tasks, settings, notes)


def remove_expert(bundle: Bundle | str | Path, name: str) -> Bundle:
    """Takes an expert out. The base stays as it is, so the other experts do not change by a bit.

    Raises:
        BundleError: unknown expert, or the last one.
    """
    bundle = Bundle.open(bundle)
    folder = bundle.expert_folder(name)
    if len(bundle.experts) == 1:
        raise BundleError(f"{bundle.path}: {name!r} is the only expert left; delete the bundle instead")
    manifest = bundle.manifest
    kept = {n: entry for n, entry in manifest.files.items() if not n.startswith(f"experts/{name}/")}
    experts = {n: record for n, record in manifest.experts.items() if n != name}
    lines = [line for line in bundle.stats() if line["expert"] != name]
    _write_manifest(bundle, manifest.model_copy(update={"files": kept, "experts": experts}))
    shutil.rmtree(folder)
    write_stats(bundle.path, lines)
    return Bundle.open(bundle.path)


def _tasks(bundle: Bundle, name: str, checkpoint: Checkpoint, *, trust_remote_code: bool) -> list[TensorTask]:
    """The bundle's tensors as tasks for the new expert; its names may differ by the model's prefix or by tying."""
    layer_map = map_layers(checkpoint, trust_remote_code=trust_remote_code)
    sources = {(r.module, r.parameter): r.tensor for r in layer_map.records.values()}
    architecture = (checkpoint.config.get("architectures") or ["unknown"])[0]
    if architecture != bundle.manifest.architecture:
        raise SourceError(
            f"{checkpoint.label}: is a {architecture}, the bundle holds {bundle.manifest.architecture} experts"
        )
    head = next((layer.tensor for layer in bundle.layers.values() if layer.role == "lm_head"), None)
    tasks = []
    for layer in bundle.layers.values():
        source = sources.get((layer.module, layer.parameter))
        if layer.tensor == head and layer_map.tied:
            source = layer_map.embedding
        if source is None:
            raise SourceError(f"{checkpoint.label}: lacks tensor {layer.tensor!r} that the bundle's experts have")
        found = checkpoint.tensors[source].shape
        if found != layer.shape:
            raise SourceError(
                f"{checkpoint.label}: tensor {source!r} is {list(found)}, the bundle's is {list(layer.shape)}"
            )
        tasks.append(_task(bundle, layer, name, source))
    return with_differences(tasks)


def _task(bundle: Bundle, layer: BundleLayer, name: str, source: str) -> TensorTask:
    method = bundle.manifest.method
    record = LayerRecord(layer.tensor, layer.module, layer.parameter, layer.role, layer.transposed)
    treatment: Treatment
    if layer.role == "linear":
        rank = rank_for_rate(layer.shape[0], layer.shape[1], method.compress_rate)
        small = factors_are_smaller(layer.shape[0], layer.shape[1], rank)
        treatment = "full" if not small else "low_rank" if rank else "average"
    else:
        treatment = {"embedding": method.embeddings, "lm_head": method.lm_head}.get(layer.role, method.norms)
    return TensorTask(record, layer.shape, treatment, layer.rank, {name: source})


def _settings(bundle: Bundle, device: str) -> Settings:
    method = bundle.manifest.method
    return Settings(
        dtype=DTYPES[bundle.manifest.dtype],
        code=bundle.code,
        device=pick_device(device),
        per_expert_scale=method.scale == "per_expert",
        seed=method.seed,
        n_oversamples=method.n_oversamples,
        n_iter=method.n_iter,
    )


def _add_tensor(
    bundle: Bundle,
    name: str,
    checkpoint: Checkpoint,
    task: TensorTask,
    settings: Settings,
    staging: Staging,
    index: int,
) -> dict[str, Any]:
    report = TensorReport()
    base = bundle.base_tensor(task.name)
    source = task.sources[name]
    with staging.tensor(index) as writer, torch.no_grad():
        raw = read_checked(checkpoint.read(source), settings.dtype, name, source, report)
        if task.record.role == "linear":
            _add_linear(bundle, name, task, raw, base, settings, writer.emit, report)
        elif task.treatment == "keep" and not torch.equal(raw.to(base.dtype), base):
            if task.as_difference:
                writer.emit(name, f"{task.record.module}.lora_B.bias", raw.float() - base.float())
            else:
                writer.emit(name, f"{task.record.module}.{task.record.parameter}", raw.to(base.dtype))
        note = writer.note(asdict(report))
    return staging.finish(index, note)


def _add_linear(
    bundle: Bundle,
    name: str,
    task: TensorTask,
    raw: Tensor,
    base: Tensor,
    settings: Settings,
    emit: Callable[[str | None, str, Tensor], None],
    report: TensorReport,
) -> None:
    mean_scale = bundle.layers[task.name].mean_scale
    assert mean_scale is not None, "every linear weight of a manifest has its mean scale"
    weight = raw.to(settings.device, torch.float32, copy=True)
    scale = frobenius_norm(weight)
    ratio = float(np.float32(scale / mean_scale)) if settings.per_expert_scale and mean_scale else 1.0
    stats = compress_residual(task, name, weight, base.to(settings.device, torch.float32), ratio, settings, emit)
    if task.treatment != "full":
        report.scales[name] = ratio
    report.stats.append(stats_line(task, name, scale, mean_scale, ratio, stats, 0.0))


def _write(staging: Staging, bundle: Bundle, name: str, notes: list[dict[str, Any]]) -> dict[str, FileEntry]:
    pieces: list[Piece] = [piece for note in notes for piece in pieces_of(note)]
    layers = list(bundle.layers.values())
    with staging.tensor(len(notes)) as writer:
        for layer in missing_siblings((piece.key for piece in pieces), layers):
            writer.emit(name, f"{layer.module}.{layer.parameter}", bundle.base_tensor(layer.tensor))
        pieces += pieces_of(staging.finish(len(notes), writer.note({})))
    scales = {
        line["tensor"]: note["report"]["scales"][name]
        for note in notes
        for line in note["report"]["stats"]
        if name in note["report"]["scales"]
    }
    folder = staging.folder / "bundle"
    clear(folder)
    tied = bundle.manifest.tied_embedding
    code = bundle.manifest.method.code
    files = write_expert(folder, name, pieces, scales, layers, staging.content, code=code, tied_embedding=tied)
    staging.publish(folder / "experts" / name)
    return files


def _commit(
    bundle: Bundle,
    name: str,
    checkpoint: Checkpoint,
    tasks: list[TensorTask],
    notes: list[dict[str, Any]],
    files: dict[str, FileEntry],
) -> None:
    digests = "".join(f"{t.sources[name]} {n['report']['digests'][name]}\n" for t, n in zip(tasks, notes, strict=True))
    linear = next(task for task in tasks if task.record.role == "linear")
    dtype = checkpoint.tensors[linear.sources[name]].dtype
    record = ExpertRecord(
        **asdict(checkpoint.whence),
        sha256=hashlib.sha256(digests.encode()).hexdigest(),
        dtype=dtype_name(dtype) if dtype else "unknown",
    )
    manifest = bundle.manifest
    low, high = manifest.scale_ratio_range
    ratios = [ratio for note in notes for ratio in note["report"]["scales"].values()]
    update = {
        "experts": {**manifest.experts, name: record},
        "files": dict(sorted({**manifest.files, **files}.items())),
        "scale_ratio_range": (min([low, *ratios]), max([high, *ratios])),
    }
    lines = [line for note in notes for line in note["report"]["stats"]]
    write_stats(bundle.path, [*bundle.stats(), *lines])
    _write_manifest(bundle, manifest.model_copy(update=update))


def _write_manifest(bundle: Bundle, manifest: Manifest) -> None:
    # Parsed again before it is written: an update must give a manifest that opens.
    write_manifest(bundle.path, Manifest.model_validate(json.loads(manifest.to_json())).to_json())


def _assess(
    bundle: Bundle,
    name: str,
    checkpoint: Checkpoint,
    tasks: list[TensorTask],
    settings: Settings,
    notes: list[dict[str, Any]],
) -> Added:
    errors = {line["tensor"]: line["relative_error"] for note in notes for line in note["report"]["stats"]}
    linear = [task for task in tasks if task.treatment == "low_rank"]
    sample = linear[:: max(1, len(linear) // SAMPLED_LAYERS)][:SAMPLED_LAYERS]
    fresh = [_fresh_error(bundle, name, checkpoint, task, settings) for task in sample]
    ratios = list(bundle.scales(name).values()) or [1.0]
    return Added(
        bundle,
        relative_error=sum(errors[task.name] for task in sample) / max(1, len(sample)),
        fresh_relative_error=sum(fresh) / max(1, len(fresh)),
        scale_ratio_range=(min(ratios), max(ratios)),
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
    residual = weight - average * (norm / len(bundle.experts))
    matrix = residual.T if task.record.transposed else residual
    u, v = rsvd(matrix, task.rank, n_oversamples=settings.n_oversamples, n_iter=settings.n_iter, seed=settings.seed)
    u, v = settings.code.decode(settings.code.encode(u, v), *matrix.shape)
    return float((matrix - u @ v).norm()) / norm
