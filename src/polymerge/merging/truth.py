"""Is what a bundle says of one tensor true? Held against the checkpoint it came from, and against the average's makers.

What a merge measured is not believed alone: a merge that went wrong may have measured wrongly too. The ratio ρ follows
from the checkpoint, the rank from the method, and a residual must bring its expert nearer. Knows tensors and tasks;
which tensor is which is `polymerge.merging.frame`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bundle.bundle import Bundle
from ..bundle.expert import ExpertReader
from ..bundle.layer import BundleLayer
from ..bundle.manifest import ExpertRecord
from ..host import dtype_name
from ..sources.checkpoint import Checkpoint
from ..sources.layers import LayerRecord
from .adapters import adapter_over, coded_adapter
from .frame import record_of_bundle
from .measure import frobenius_norm
from .reading import same_numbers
from .tables import mean_of_tables
from .treatment import TensorTask, treatment_of
from .vocabulary import tables_of_bundle

# A rebuilt tensor may differ from what the merge measured by the rounding of the float32 products alone.
TOLERANCE = 1e-4
# Whole tensors are not computed; those of an adapter are, when they are read.
EXACT = 1e-6
# Half a unit in the last place, relative.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Relative, of a matrix as `quantize` stores it: 0.009 of Gaussian numbers in 8 bits, 0.1 in 4; GPTQ moves some further.
BASE_ROUNDING = {"int8": 0.03, "int4": 0.3}
# A ratio is stored in float32; the norms behind it are sums of squares.
SAME_RATIO = 1e-5
SAME_MEAN = 1e-12


@dataclass(frozen=True)
class Finding:
    """How far one tensor of an expert is from its checkpoint, and what is wrong with it, if anything."""

    error: float
    problem: str | None = None


def _base_rounding(bundle: Bundle, task: TensorTask) -> float:
    """What a base in fewer bits may be away from the average."""
    code = bundle.manifest.base_code
    return BASE_ROUNDING[code] if code and task.record.role == "linear" else 0.0


def method_problems(bundle: Bundle) -> Iterator[str]:
    """Where the manifest's ranks are not those that its method gives."""
    for layer in bundle.manifest.layers:
        _, rank = treatment_of(record_of_bundle(layer), layer.shape, bundle.manifest.method)
        if rank != layer.rank:
            yield f"base: tensor {layer.tensor!r} has residuals of rank {layer.rank}, the method gives {rank}"
        # An adapter has its own rank, whatever the rate pays for; a residual from the average none beyond.
        most = rank if layer.base == "average" else min(layer.shape)
        for expert, its in layer.ranks.items():
            if not 0 < its <= most:
                yield f"expert {expert!r}: tensor {layer.tensor!r} has a residual of rank {its}, of at most {most}"


def record_problem(layer: BundleLayer, record: LayerRecord) -> str | None:
    """What the manifest says of a matrix that is not so in the expert's architecture."""
    if not record.known or "linear" not in (layer.role, record.role) or layer.transposed == record.transposed:
        return None
    layout = "[in, out]" if record.transposed else "[out, in]"
    return f"tensor {layer.tensor!r} is stored {layout}, not as the manifest says"


def held_against(
    task: TensorTask, expert: str, checkpoint: Checkpoint, reader: ExpertReader, bundle: Bundle, measured: float
) -> Finding:
    """One tensor of an expert, as the bundle gives it back, against its checkpoint's.

    Args:
        measured: what the merge lost of it (relative error).
    """
    original, rebuilt = checkpoint.read(task.sources[expert]), reader.read(task.name)
    error = relative_error(original, rebuilt)
    rounding = ROUNDING[dtype_name(task.dtype) if task.dtype else bundle.manifest.dtype] + _base_rounding(bundle, task)
    if task.treatment == "copy":
        return Finding(error, None if same_numbers(original, rebuilt) else f"is {error:.3g} from")
    own_rows = bundle.manifest.experts[expert].own_rows if bundle.layers[task.name].table else []
    if not task.against_base:
        if task.treatment == "average" and own_rows:  # these were not averaged
            error = relative_error(original[own_rows], rebuilt[own_rows])
            return Finding(error, None if error <= EXACT + rounding else f"is {error:.3g} from")
        allowed = EXACT + rounding if task.treatment == "keep" else float("inf")
        return Finding(error, None if error <= allowed else f"is {error:.3g} from")
    problem = None
    if not error <= measured + (EXACT if task.treatment == "full" else TOLERANCE) + rounding:
        problem = f"is {error:.3g} from"
    if problem is None and own_rows and relative_error(original[own_rows], rebuilt[own_rows]) > EXACT + rounding:
        problem = "has other rows of its own in the bundle than"
    if problem is None and task.treatment != "full":
        problem = _residual_problem(original, error, reader, bundle, bundle.manifest.experts[expert], task)
    if problem is None and task.base == "adapters":
        problem = _adapter_problem(task, expert, checkpoint, reader, bundle)
    if problem is None and bundle.layers[task.name].rank_of(expert) < task.rank and bundle.code.peft_readable:
        allowed = EXACT + rounding
        problem = (
            f"has a residual of less than the rank that it needs: it is {error:.3g} from" if error > allowed else None
        )
    return Finding(error, problem)


def _adapter_problem(
    task: TensorTask, expert: str, checkpoint: Checkpoint, reader: ExpertReader, bundle: Bundle
) -> str | None:
    """What is wrong with an adapter's factors over the model that they were trained on."""
    over = adapter_over(task, checkpoint, task.sources[expert], bundle.base_tensor(task.name))
    if over is None:  # of another kind, or of another model
        return None
    made = coded_adapter(over, bundle.code)
    expected = made[2].decode(made[1], *task.matrix_shape) if made else None
    stored = reader.factors(task.name)
    if expected is None or stored is None:
        return None if expected is stored else "has other factors over the base than the adapter"
    same = all(
        one.shape == other.shape and torch.equal(one, other) for one, other in zip(expected, stored, strict=True)
    )
    return None if same else "has other factors over the base than the adapter"


def average_problems(
    bundle: Bundle, tasks: Mapping[str, tuple[TensorTask, ...]], checkpoints: Mapping[str, Checkpoint]
) -> Iterator[str]:
    """Where the base is not the experts' average. Asked only of a bundle whose base was made of just these experts."""
    tables = tables_of_bundle(bundle)
    for row in zip(*tasks.values(), strict=True):
        task = row[0]
        if task.treatment == "copy":
            continue
        base, sources = bundle.base_tensor(task.name), dict(zip(tasks, row, strict=True))
        if task.base == "adapters":
            others = (e for e, t in sources.items() if not adapter_over(t, checkpoints[e], t.sources[e], base))
            if (other := next(others, None)) is not None:
                yield f"base: tensor {task.name!r} is not the one under the adapter of expert {other!r}"
            continue
        base = base.double()
        read = functools.partial(_read, checkpoints, sources)
        whole = not task.as_difference and tables is not None and tables.holds(task.record.role, task.shape)
        if tables and (whole or bundle.layers[task.name].table):
            mean = mean_of_tables(tables, read).double()
        else:
            mean = _mean(task, base, list(tasks), read)
        rounding = ROUNDING[bundle.layers[task.name].dtype or bundle.manifest.dtype] + _base_rounding(bundle, task)
        error = relative_error(mean, base)
        if not error <= TOLERANCE + rounding:
            yield f"base: tensor {task.name!r} is {error:.3g} from the experts' average"


def _read(checkpoints: Mapping[str, Checkpoint], tasks: Mapping[str, TensorTask], expert: str) -> Tensor:
    return checkpoints[expert].read(tasks[expert].sources[expert])


def _mean(task: TensorTask, base: Tensor, experts: Sequence[str], read: Callable[[str], Tensor]) -> Tensor:
    """float64; of linear weights the mean of what is normalised, at the mean of the norms."""
    total, scales = torch.zeros_like(base), []
    for expert in experts:
        tensor = read(expert).double()
        norm = float(tensor.norm()) if task.against_base else 1.0
        scales.append(norm)
        total += tensor / norm if norm else tensor
    return total.mul_(sum(scales) / len(scales) / len(scales))


def made_of_these(bundle: Bundle) -> bool:
    """Whether the base is the average of the experts that the bundle holds now: none was added or removed since."""
    lines: dict[str, list[dict[str, object]]] = {}
    for line in bundle.stats():
        group = lines.setdefault(line["tensor"], [])
        if group and next(reversed(lines)) != line["tensor"]:  # written later than the next tensor's
            return False
        group.append(line)
    return bool(lines) and all(_is_mean(group, bundle, bundle.layers.get(name)) for name, group in lines.items())


def relative_error(original: Tensor, rebuilt: Tensor) -> float:
    """||W - W'|| / ||W||, in float64; of zeros ||W'||."""
    norm = float(original.double().norm())
    difference = float((original.double() - rebuilt.double()).norm())
    return difference / norm if norm else difference


def _is_mean(lines: list[dict[str, object]], bundle: Bundle, layer: BundleLayer | None) -> bool:
    if layer is not None and layer.base == "adapters":
        return [line["expert"] for line in lines] == bundle.experts
    scales = [float(str(line["scale"])) for line in lines]
    mean = float(str(lines[0]["mean_scale"]))
    same = abs(sum(scales) / len(scales) - mean) <= SAME_MEAN * mean
    return [line["expert"] for line in lines] == bundle.experts and same


def _residual_problem(
    original: Tensor, error: float, reader: ExpertReader, bundle: Bundle, record: ExpertRecord, task: TensorTask
) -> str | None:
    """What is wrong with a weight that is as far from its checkpoint as the merge measured."""
    layer, ratio = bundle.layers[task.name], reader.ratio(task.name)
    norm = frobenius_norm(original.float())
    expected, other_rows = 1.0, layer.table and (record.vocabulary or record.rows)
    scaled = bundle.manifest.method.scale == "per_expert" and layer.base == "average" and not other_rows
    if scaled and layer.mean_scale:
        expected = norm / layer.mean_scale
    if abs(ratio - expected) > SAME_RATIO * max(1.0, expected):
        return f"has the scale {ratio:.6g} in the bundle, but {expected:.6g} follows from"
    alone = relative_error(original, ratio * bundle.base_tensor(task.name)[: len(original)].float())
    if error > alone * (1 + 1e-3) + TOLERANCE:
        return f"is {error:.3g} with its residual, {alone:.3g} without, from"
    return None
