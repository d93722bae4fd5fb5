"""Does a bundle still say what its sources say?

Every expert rebuilt and compared with its checkpoint, tensor by tensor, after the files themselves were looked at
(`polymerge.bundle.verify`). Which tensor is which is `polymerge.merging.frame`'s, what was kept
of it `polymerge.merging.treatment`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.verify import SourceCheck, Verification, verify_files
from ..errors import PolymergeError, SourceError
from ..host import DTYPES
from ..recipe.lines import as_source
from ..sources.checkpoint import Checkpoint, Origin
from ..sources.opening import opened_again
from ..sources.persona import differing, persona_of
from .align import as_in_bundle
from .frame import Expert, Frame, check_settings, expert_of, frame_of_bundle, table_rows_in
from .precision import with_dtypes
from .treatment import TensorTask, tasks_for
from .truth import average_problems, held_against, made_of_these, method_problems, record_problem

# An expert's checkpoint, in the bundle's order, and the tensors that were compared.
Compared = tuple[Checkpoint, tuple[TensorTask, ...]]


def verify(
    bundle: Bundle | str | Path,
    *,
    sources: bool = False,
    source: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Checks hashes and structure, and with `sources` every expert against its checkpoint.

    Args:
        source: expert -> its source, where a checkpoint is no longer where the manifest says; implies `sources`.
        progress: called with what is being looked at.

    Raises:
        BundleError: the bundle cannot even be opened, or has no such expert. SourceError: a source cannot be.
    """
    bundle = Bundle.open(bundle)
    if not isinstance(sources, bool):
        raise PolymergeError("sources: true or false; where a checkpoint is now is said with source={expert: path}")
    moved = {expert: as_source(given, expert).source for expert, given in (source or {}).items()}
    for expert in moved:
        bundle.expert_folder(expert)
    result = verify_files(bundle, progress)
    if result.ok:
        result.problems += method_problems(bundle)
    if not (sources or moved) or not result.ok:
        return result
    checked = {}
    for expert in bundle.experts:
        if progress:
            progress(f"{expert} against its source")
        candidate = _opened(bundle, expert, moved.get(expert), frame_of_bundle(bundle))
        compared = _checked_expert(bundle, candidate, moved.get(expert), result)
        if compared:
            checked[expert] = compared
    if result.ok and made_of_these(bundle):
        if progress:
            progress("the average against the sources")
        makers = {expert: checkpoint for expert, (checkpoint, _) in checked.items()}
        result.problems += average_problems(bundle, {e: tasks for e, (_, tasks) in checked.items()}, makers)
    return result


def _checked_expert(bundle: Bundle, candidate: Expert, moved: str | None, result: Verification) -> Compared | None:
    """Adds to the result how far an expert is from its checkpoint, and what is wrong with it. Returns what was
    compared; None where the checkpoint does not fit.

    Args:
        moved: where the checkpoint is now; None where the manifest says.
    """
    expert, checkpoint = candidate.name, candidate.checkpoint
    source, frame = moved or bundle.manifest.experts[expert].source, frame_of_bundle(bundle)
    try:
        check_settings(frame, candidate)
        unlike = differing(bundle.persona(expert), persona_of(checkpoint))
        tasks = tasks_for(frame, [candidate], bundle.manifest.method)
    except SourceError as reason:
        result.problems.append(f"{source}: {reason}; is it the checkpoint that was merged?")
        return None
    try:
        checkpoint = as_in_bundle(bundle, expert, checkpoint, tasks)
    except SourceError as reason:
        result.problems.append(f"expert {expert!r}: {reason}; copy the bundle again")
        return None
    tasks = with_dtypes(tasks, {expert: checkpoint}, DTYPES[bundle.manifest.dtype])
    result.problems += [f"expert {expert!r}: its {group} is not the one of {source}" for group in unlike]
    vocabulary = bundle.vocabulary(expert) or table_rows_in(frame, candidate)
    if vocabulary != candidate.table_rows:
        result.problems.append(
            f"expert {expert!r}: its vocabulary has {vocabulary} tokens, that of {source} {candidate.table_rows}"
        )
        return None
    recorded = {line["tensor"]: line["relative_error"] for line in bundle.stats() if line["expert"] == expert}
    reader, errors = bundle.expert_reader(expert), {}
    for task in tasks:
        record = candidate.layer_map.records[task.sources[expert]]
        wrong = record_problem(bundle.layers[task.name], record)
        if wrong and candidate.layer_map.layers_from == bundle.manifest.layers_from:
            result.problems.append(f"expert {expert!r}: {wrong}")
        measured = recorded.get(task.name, 0.0)
        finding = held_against(task, expert, checkpoint, reader, bundle, measured)
        errors[task.name] = finding.error
        if finding.problem:
            result.problems.append(
                f"expert {expert!r}: tensor {task.name!r} {finding.problem} {source}, the merge measured "
                f"{measured:.3g}; is it the checkpoint that was merged?"
            )
    worst = max(errors, key=errors.__getitem__)
    exact = sum(error == 0.0 for error in errors.values())
    where = worst if errors[worst] else ""
    result.sources.append(SourceCheck(expert, source, len(tasks), exact, errors[worst], where))
    return checkpoint, tasks


def _opened(bundle: Bundle, expert: str, moved: str | None, frame: Frame) -> Expert:
    """The expert as it was merged, or as it lies where it was moved."""
    record = bundle.manifest.experts[expert]
    revision = None if moved else record.revision
    try:
        origin = Origin(moved or record.source, revision, record.base, record.base_revision)
        return expert_of(expert, opened_again(origin), frame=frame)
    except PolymergeError as reason:
        raise SourceError(f"expert {expert!r}: {reason}; say where it is now with --source {expert}=PATH") from None
