"""Does a bundle still say what its sources say?

Every expert rebuilt and compared with its checkpoint, tensor by tensor, after the files themselves were looked at
(`polymerge.bundle.verify`). Which tensor is which, and what was kept of it, is `polymerge.merging.treatment`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ..bundle.bundle import Bundle
from ..bundle.verify import SourceCheck, Verification, verify_files
from ..errors import PolymergeError, SourceError
from ..sources.checkpoint import Origin
from ..sources.layers import map_layers
from ..sources.opening import opened_again
from ..sources.persona import differing, persona_of
from .reading import same_numbers
from .treatment import Expert, check_settings, frame_of_bundle, table_rows_in, tasks_for

# A rebuilt tensor may differ from what the merge measured by the rounding of the float32 products alone.
TOLERANCE = 1e-4
# Half a unit in the last place, relative.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


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
        BundleError: the bundle cannot even be opened. SourceError: a source cannot be.
    """
    bundle = Bundle.open(bundle)
    result = verify_files(bundle, progress)
    moved = source or {}
    if (sources or moved) and result.ok:
        for expert in bundle.experts:
            if progress:
                progress(f"{expert} against its source")
            check_source(bundle, expert, moved.get(expert), result)
    return result


def check_source(bundle: Bundle, expert: str, moved: str | None, result: Verification) -> None:
    """Adds to the result how far an expert is from its checkpoint, and what is wrong with it.

    Args:
        moved: where the checkpoint is now; None where the manifest says.

    Raises:
        SourceError: the checkpoint cannot be opened.
    """
    source = moved or bundle.manifest.experts[expert].source
    candidate, frame = _opened(bundle, expert, moved), frame_of_bundle(bundle)
    try:
        check_settings(frame, candidate)
        unlike = differing(bundle.persona(expert), persona_of(candidate.checkpoint))
        tasks = tasks_for(frame, [candidate], bundle.manifest.method)
    except SourceError as reason:
        result.problems.append(f"{source}: {reason}; is it the checkpoint that was merged?")
        return
    result.problems += [f"expert {expert!r}: its {group} is not the one of {source}" for group in unlike]
    vocabulary = bundle.vocabulary(expert) or table_rows_in(frame, candidate)
    if vocabulary != candidate.table_rows:
        result.problems.append(
            f"expert {expert!r}: its vocabulary has {vocabulary} tokens, that of {source} {candidate.table_rows}"
        )
        return
    own_rows = bundle.manifest.experts[expert].own_rows
    recorded = {line["tensor"]: line["relative_error"] for line in bundle.stats() if line["expert"] == expert}
    reader, errors = bundle.expert_reader(expert), {}
    for task in tasks:
        original, rebuilt = candidate.checkpoint.read(task.sources[expert]), reader.read(task.name)
        averaged = task.treatment == "average" and task.record.role != "linear"
        if averaged and own_rows and bundle.layers[task.name].table:  # these were not averaged
            original, rebuilt, averaged = original[own_rows], rebuilt[own_rows], False
        errors[task.name] = error = _relative_error(original, rebuilt)
        measured = recorded.get(task.name, 0.0)
        if task.treatment == "copy":
            right = same_numbers(original, rebuilt)
        else:
            right = averaged or error <= measured + TOLERANCE + ROUNDING[bundle.manifest.dtype]
        if not right:
            result.problems.append(
                f"expert {expert!r}: tensor {task.name!r} is {error:.3g} from {source}, the merge measured "
                f"{measured:.3g}; is it the checkpoint that was merged?"
            )
    worst = max(errors, key=errors.__getitem__)
    exact = sum(error == 0.0 for error in errors.values())
    where = worst if errors[worst] else ""
    result.sources.append(SourceCheck(expert, source, len(tasks), exact, errors[worst], where))


def _opened(bundle: Bundle, expert: str, moved: str | None) -> Expert:
    """The expert as it was merged, or as it lies where it was moved."""
    record = bundle.manifest.experts[expert]
    revision = None if moved else record.revision
    try:
        origin = Origin(moved or record.source, revision, record.base, record.base_revision)
        checkpoint = opened_again(origin)
        return Expert(expert, checkpoint, map_layers(checkpoint))
    except PolymergeError as reason:
        raise SourceError(f"expert {expert!r}: {reason}; say where it is now with --source {expert}=PATH") from None


def _relative_error(original: Tensor, rebuilt: Tensor) -> float:
    """||W - W'|| / ||W||, in float64; of zeros ||W'||."""
    norm = float(original.double().norm())
    difference = float((original.double() - rebuilt.double()).norm())
    return difference / norm if norm else difference
