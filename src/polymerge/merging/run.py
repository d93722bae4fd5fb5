"""The merge: compress tensor by tensor, each straight to the bundle's files, end these, move the bundle into place.

Knows the order of the work, progress and resuming. Who does the tensors is the executor's, the arithmetic is in
`polymerge.merging.compress`, the files in `polymerge.merging.journal` and `polymerge.merging.finish`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle.alignment import write_alignment
from ..bundle.base import base_of
from ..bundle.bundle import Bundle
from ..bundle.files import FileEntry, check_free_space, disk_errors, scratches_of
from ..bundle.layer import BundleLayer
from ..bundle.lock import writing
from ..bundle.manifest import Manifest, Method, version_of
from ..bundle.place import check_output, mark_of, publish, restore, settled, work_folder
from ..bundle.write import bundle_config, copy_model_files, tool_versions, write_manifest, write_stats
from ..errors import ErrorBudgetExceeded
from ..host import dtype_name, peak_memory, pick_device
from ..recipe.merge import Recipe
from ..sources.checkpoint import architecture_of
from ..version import __version__
from .align import aligned, digest_of_orders
from .executor import Executor, in_threads
from .finish import finish_base, finish_expert
from .journal import Note, Staging, begin, end_published, half_done
from .layout import Layout, layout_of
from .personas import store_persona
from .plan import MergePlan, plan_merge
from .proof import prove
from .records import bundle_layer, expert_record, own_rows_of, ratios_of, scales_of, with_tables
from .treatment import TensorTask
from .vocabulary import numbers_of


@dataclass(frozen=True)
class Progress:
    """How far a merge is.

    Attributes:
        done, total: bytes of the sources' tensors (in float32, all experts).
        tensor: the one that was finished last.
        seconds: since the start of this run.
        seconds_left: None until it can be told.
        peak_memory: peak resident bytes of the process.
        resumed: bytes that an earlier run had already done.
    """

    done: int
    total: int
    tensor: str
    seconds: float
    seconds_left: float | None
    peak_memory: int
    resumed: int


OnProgress = Callable[[Progress], None]


def run_plan(
    plan: MergePlan,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    executor: Executor = in_threads,
    progress: OnProgress | None = None,
) -> Bundle:
    """Merges a plan's experts into a bundle at `output`.

    The result depends only on the recipe and the sources: not on the workers or where they run, and not on whether
    the merge was killed and resumed. Nothing appears at `output` before the bundle is whole. Where `output` is a link,
    the bundle comes to where it leads.

    Args:
        resume: go on with the half-done work of the same merge, if there is any.
        executor: who does the tensors: this process, or a cluster (`polymerge.merging.ray`).
        progress: called after every tensor.

    Raises:
        SourceError: values that are not finite, or an architecture that a bundle cannot hold.
        OutputExistsError, LockedError, DiskSpaceError: before any tensor is read.
        ErrorBudgetExceeded: the bundle is whole, but a tensor's relative error is over `max_error`.
    """
    output = settled(output)
    pick_device(plan.recipe.device)
    _heal(output)
    check_output(output, overwrite=overwrite)
    half = half_done(work_folder(output)) if resume else 0
    check_free_space(output.parent, plan.write_bytes - half)
    tables = [key for key in ("embeddings", "lm_head") if getattr(plan.recipe, key) == "compress"]
    proof = prove(plan.first, _merge_small, exact=plan.recipe.compress_rate == 0.0, tables=tables)
    seen = plan.calibration.notes if plan.calibration else ()
    plan = aligned(replace(plan, notes=(*plan.notes, *seen, proof.note)))
    return _run(plan, output, overwrite=overwrite, resume=resume, executor=executor, progress=progress)


def _heal(output: Path) -> None:
    """Ends what a killed run had as good as done, also where this one will be refused."""
    work = work_folder(output)
    if mark_of(work) is not None or scratches_of(work):
        with disk_errors(output), writing(output):
            restore(output)
            end_published(work)


def _merge_small(recipe: dict[str, Any], output: Path) -> Bundle:
    return _run(plan_merge(recipe), output)


def _run(
    plan: MergePlan,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    executor: Executor = in_threads,
    progress: OnProgress | None = None,
) -> Bundle:
    work = work_folder(output)
    with disk_errors(output), writing(output):
        restore(output)
        end_published(work)
        check_output(output, overwrite=overwrite)  # again: now nobody else changes it
        begin(work, fingerprint(plan), resume=resume)
        layout = layout_of(plan)
        staging = Staging(work, layout)
        _compress_all(plan, staging, executor, progress)
        _finish(plan, staging, layout)
        publish(staging.bundle, output)
        bundle = Bundle.open(output)
    _check_budget(plan.recipe, bundle)
    return bundle


def fingerprint(plan: MergePlan) -> dict[str, Any]:
    """What must be equal for half-done work to be gone on with. Workers, device and how the bundle will answer may
    differ."""
    answering = {"config", "thinker", "staged", "memory_limit"}
    recipe = plan.recipe.model_dump(mode="json", exclude={"workers", "device", "max_error", "calibration", *answering})
    tables = {"tables": asdict(plan.tables)} if plan.tables else {}
    orders = {"alignment": digest_of_orders(plan.alignments)} if plan.alignments else {}
    texts = {"calibration": dict(plan.calibration.digests)} if plan.calibration else {}
    return {
        **orders,
        **texts,
        "polymerge": __version__,
        **tables,
        "recipe": recipe,
        "sources": {name: checkpoint.fingerprint() for name, checkpoint in plan.checkpoints.items()},
        "configs": {name: checkpoint.config for name, checkpoint in plan.checkpoints.items()},
        "tasks": [[task.name, task.treatment, task.base, *task.ranks] for task in plan.tasks],
    }


def _compress_all(plan: MergePlan, staging: Staging, executor: Executor, progress: OnProgress | None) -> None:
    weights = [_work(task) for task in plan.tasks]
    begun = len(staging.notes)
    resumed = done = sum(weights[:begun])
    began = time.monotonic()
    for index, work in executor(plan, range(begun, len(plan.tasks))):
        staging.finish(work)
        done += weights[index]
        if progress:
            seconds = time.monotonic() - began
            left = seconds * (sum(weights) - done) / (done - resumed) if done > resumed else None
            progress(Progress(done, sum(weights), plan.tasks[index].name, seconds, left, peak_memory(), resumed))


def _work(task: TensorTask) -> int:
    return task.numel * len(task.sources) * 4


def _finish(plan: MergePlan, staging: Staging, layout: Layout) -> None:
    folder, notes = staging.bundle, staging.notes
    layers = tuple(bundle_layer(task, note, plan.code) for task, note in zip(plan.tasks, notes, strict=True))
    dtype, code = dtype_name(plan.dtype), plan.recipe.trust_remote_code
    size = plan.tables.size if plan.tables else None
    config = bundle_config(plan.first.config, dtype=dtype, tied=plan.tied, code=code, vocabulary=size)
    tokenizer = plan.personas.bundle.folder
    files = copy_model_files(plan.first.folder, folder, config, code=code, tokenizer=tokenizer)
    files |= finish_base(staging, list(dict.fromkeys(layout.base.values())), layers)
    base = base_of(folder, layers)
    for expert in plan.checkpoints:
        scales, rows = scales_of(expert, plan.tasks, notes), numbers_of(own_rows_of(expert, plan.tasks, notes))
        options: dict[str, Any] = {"code": plan.code, "tied_embedding": plan.tied_embedding, "rows": rows}
        files |= finish_expert(staging, expert, base, layers, scales, **options)
        if expert in plan.alignments:
            files |= write_alignment(folder, expert, plan.alignments[expert])
        persona, groups = plan.personas.experts[expert], plan.personas.groups[expert]
        files |= store_persona(folder, expert, persona, groups, dtype=dtype, tied=plan.tied, code=code)
    write_stats(folder, (line.to_json() for note in notes for line in note.stats))
    write_manifest(folder, _manifest(plan, notes, layers, files).to_json())


def _manifest(
    plan: MergePlan, notes: list[Note], layers: tuple[BundleLayer, ...], files: dict[str, FileEntry]
) -> Manifest:
    recipe = plan.recipe
    ratios, groups = ratios_of(notes), plan.personas.groups
    method = Method(**recipe.model_dump(include=set(Method.model_fields)))
    experts = {n: expert_record(n, c, plan.tasks, notes, groups[n]) for n, c in plan.checkpoints.items()}
    vocabulary = plan.tables.narrow(next(iter(experts))) if plan.tables else None
    layers = with_tables(layers, plan.tasks, experts.values(), vocabulary)
    return Manifest(
        format_version=version_of(method, plan.code, experts.values(), layers, vocabulary),
        polymerge_version=__version__,
        method=method,
        dtype=dtype_name(plan.dtype),
        architecture=architecture_of(plan.first.config),
        layers_from=plan.layer_map.layers_from,
        tied_embedding=plan.tied_embedding,
        vocabulary=vocabulary,
        experts=experts,
        scale_ratio_range=(min(ratios, default=1.0), max(ratios, default=1.0)),
        layers=layers,
        files=dict(sorted(files.items())),
        versions=tool_versions(),
        notes=plan.notes,
    )


def _check_budget(recipe: Recipe, bundle: Bundle) -> None:
    if recipe.max_error is None:
        return
    over = sorted(
        (s for s in bundle.stats() if s["relative_error"] > recipe.max_error), key=lambda s: -s["relative_error"]
    )
    if over:
        worst = over[0]
        raise ErrorBudgetExceeded(
            f"{bundle.path}: {len(over)} tensors lost more than max_error {recipe.max_error:g}; the worst is "
            f"{worst['tensor']!r} of {worst['expert']!r} with {worst['relative_error']:.3g}; lower the compress rate"
        )
