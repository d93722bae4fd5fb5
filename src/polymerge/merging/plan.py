"""What a merge will do, from configurations and headers alone: which tensors, which ranks, how many bytes.

Refuses experts that do not fit each other before a single weight is read. Knows nothing of how tensors are compressed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..errors import SourceError
from ..host import DTYPES, dtype_name
from ..method.codes import Code, code_of
from ..method.rsvd import factors_are_smaller, rank_for_rate
from ..recipe.merge import CodeName, Recipe, Source
from ..sources.checkpoint import Checkpoint
from ..sources.layers import LayerMap, LayerRecord, map_layers
from ..sources.opening import open_checkpoint
from ..sources.outline import OutlineCheckpoint, outline

Treatment = Literal["low_rank", "full", "average", "keep", "copy"]

# Settings that shapes do not show, and with which one set of weights means two different models.
MUST_AGREE = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "num_experts_per_tok",
)
SHOULD_AGREE = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "max_position_embeddings",
    "sliding_window",
)


@dataclass(frozen=True)
class TensorTask:
    """What happens to one tensor.

    Attributes:
        record: what the tensor is.
        shape: as stored.
        treatment: "low_rank" (factors per expert), "full" (each expert's own, because factors would be no smaller),
            "average" (one for all), "keep" (each expert's own), "copy" (unknown to the model: the first expert's).
        rank: of the residuals; 0 unless "low_rank".
        sources: expert -> the tensor's name in that expert's checkpoint.
        as_difference: a bias of a low-rank layer: an adapter holds its difference from the base's, as PEFT does.
    """

    record: LayerRecord
    shape: tuple[int, ...]
    treatment: Treatment
    rank: int
    sources: Mapping[str, str]
    as_difference: bool = False

    @property
    def name(self) -> str:
        return self.record.tensor

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of a linear weight."""
        rows, columns = self.shape
        return (columns, rows) if self.record.transposed else (rows, columns)

    def expert_bytes(self, dtype: torch.dtype, code: Code) -> int:
        """What one expert's adapter stores for this tensor, at most."""
        if self.treatment in ("full", "keep"):
            return self.numel * dtype.itemsize
        return code.bytes(*self.matrix_shape, self.rank) if self.treatment == "low_rank" else 0


@dataclass(frozen=True)
class MergePlan:
    """A checked merge. Sizes in bytes; `keep` tensors count as if no two experts shared one."""

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    layer_map: LayerMap
    tasks: tuple[TensorTask, ...]
    dtype: torch.dtype
    tied: bool
    notes: tuple[str, ...]

    @property
    def first(self) -> Checkpoint:
        return next(iter(self.checkpoints.values()))

    @property
    def tied_embedding(self) -> str | None:
        """The module of the input embedding, where it is the output head as well."""
        tensor = self.layer_map.embedding if self.tied else None
        return self.layer_map.records[tensor].module if tensor else None

    @property
    def code(self) -> Code:
        """How residuals are stored."""
        return code_of(self.recipe.code, self.dtype)

    @property
    def base_bytes(self) -> int:
        return sum(task.numel for task in self.tasks) * self.dtype.itemsize

    @property
    def residual_bytes(self) -> int:
        """Of one expert's low-rank factors."""
        return sum(t.expert_bytes(self.dtype, self.code) for t in self.tasks if t.treatment == "low_rank")

    @property
    def own_bytes(self) -> int:
        """Of one expert's own whole tensors, at most."""
        return sum(t.expert_bytes(self.dtype, self.code) for t in self.tasks if t.treatment != "low_rank")

    @property
    def write_bytes(self) -> int:
        return self.base_bytes + len(self.checkpoints) * (self.residual_bytes + self.own_bytes)

    @property
    def read_bytes(self) -> int:
        """Every tensor is read twice: for the average, then for the residuals against it."""
        infos = (c.tensors[t.sources[e]] for e, c in self.checkpoints.items() for t in self.tasks)
        return 2 * sum(info.numel * (info.dtype or torch.float32).itemsize for info in infos)

    @property
    def memory_bytes(self) -> int:
        """Estimate of the arithmetic's peak: for a linear weight the base, a residual and its copy in float32."""
        linear = max((t.numel for t in self.tasks if t.record.role == "linear"), default=0)
        whole = max((t.numel for t in self.tasks), default=0)
        return max(self.recipe.workers * linear * 4 * 4, whole * (2 * self.dtype.itemsize + 1))

    def summary(self) -> dict[str, Any]:
        """The plan as plain data (`polymerge plan --json`)."""
        experts = len(self.checkpoints)
        source = sum(t.numel for t in self.tasks) * self.dtype.itemsize
        ranks = sorted({t.rank for t in self.tasks if t.treatment == "low_rank"})
        return {
            "experts": {name: c.label for name, c in self.checkpoints.items()},
            "architecture": (self.first.config.get("architectures") or ["unknown"])[0],
            "layers_from": self.layer_map.layers_from,
            "compress_rate": self.recipe.compress_rate,
            "code": self.recipe.code,
            "dtype": dtype_name(self.dtype),
            "tensors": len(self.tasks),
            "compressed_tensors": sum(t.treatment == "low_rank" for t in self.tasks),
            "ranks": [ranks[0], ranks[-1]] if ranks else [],
            "separate_models_bytes": experts * source,
            "base_bytes": self.base_bytes,
            "residual_bytes_per_expert": self.residual_bytes,
            "own_bytes_per_expert": self.own_bytes,
            "write_bytes": self.write_bytes,
            "read_bytes": self.read_bytes,
            "memory_bytes": self.memory_bytes,
            "notes": list(self.notes),
        }


def plan_merge(recipe: Recipe, *, weights: bool = True) -> MergePlan:
    """Opens every source, checks that they fit each other and decides each tensor's treatment.

    Args:
        weights: off, hub ids are not downloaded: their tensors are taken from their configuration, or from the
            recipe's `config`. Such a plan says sizes; it cannot be merged.

    Raises:
        SourceError: naming the first tensors or settings that differ.
    """
    checkpoints = {name: _opened(recipe, source, weights) for name, source in recipe.experts.items()}
    maps = {
        name: map_layers(checkpoint, trust_remote_code=recipe.trust_remote_code)
        for name, checkpoint in checkpoints.items()
    }
    first = next(iter(checkpoints))
    notes = list(maps[first].notes)
    outlined = [name for name, checkpoint in checkpoints.items() if isinstance(checkpoint, OutlineCheckpoint)]
    if outlined:
        shown = recipe.config or "the hub's config.json"
        notes.append(f"sizes of {', '.join(outlined)} are from {shown} alone; no weight was looked at")
    for name in list(checkpoints)[1:]:
        notes += _check_settings(first, checkpoints[first], name, checkpoints[name])
    tied = all(layer_map.tied for layer_map in maps.values())
    names = {name: _names(checkpoints[name], maps[name], maps, tied) for name in checkpoints}
    _check_tensors(checkpoints, names)
    reference = next((n for n in checkpoints if not maps[n].tied), first)
    tasks = tuple(
        _task(recipe, maps[reference].records[tensor], checkpoints, {e: names[e][tensor] for e in checkpoints})
        for tensor in names[reference]
    )
    tasks = tuple(with_differences(tasks))
    return MergePlan(
        recipe, checkpoints, maps[reference], tasks, _dtype(recipe, checkpoints, tasks), tied, tuple(notes)
    )


def replanned(plan: MergePlan, *, compress_rate: float, code: CodeName) -> MergePlan:
    """The same experts at another rate and with another code, without opening them again."""
    recipe = plan.recipe.model_copy(update={"compress_rate": compress_rate, "code": code})
    tasks = [_task(recipe, task.record, plan.checkpoints, task.sources) for task in plan.tasks]
    return replace(plan, recipe=recipe, tasks=tuple(with_differences(tasks)))


def _opened(recipe: Recipe, source: Source, weights: bool) -> Checkpoint:
    found = None if weights else outline(source.source, recipe.config, revision=source.revision)
    return found or open_checkpoint(source)


def with_differences(tasks: Sequence[TensorTask]) -> list[TensorTask]:
    """Biases beside a weight that is stored against the base are stored against the base's too."""
    linear = (task for task in tasks if task.record.role == "linear")
    against_base = {task.record.module for task in linear if task.treatment in ("low_rank", "average")}
    return [replace(t, as_difference=t.record.parameter == "bias" and t.record.module in against_base) for t in tasks]


def _names(checkpoint: Checkpoint, layer_map: LayerMap, maps: Mapping[str, LayerMap], tied: bool) -> dict[str, str]:
    """Tensor of the bundle -> tensor of this checkpoint. Where only some experts tie their head, the tied ones
    give their embedding as head too; where all do, a head that a checkpoint stores beside it is left out."""
    names = {tensor: tensor for tensor in checkpoint.tensors}
    if layer_map.tied and layer_map.lm_head:
        names.pop(layer_map.lm_head)
    if layer_map.tied and not tied and layer_map.embedding:
        head = next((m.lm_head for m in maps.values() if not m.tied and m.lm_head), None)
        if head:
            names[head] = layer_map.embedding
    return names


def _check_settings(first: str, one: Checkpoint, name: str, other: Checkpoint) -> list[str]:
    if one.config.get("architectures") != other.config.get("architectures"):
        raise SourceError(
            f"experts {first!r} and {name!r} have different architectures: "
            f"{one.config.get('architectures')} and {other.config.get('architectures')}"
        )
    for key in MUST_AGREE:
        if one.config.get(key) != other.config.get(key):
            raise SourceError(
                f"experts {first!r} and {name!r} differ in {key}: {one.config.get(key)} and {other.config.get(key)}"
            )
    differing = [key for key in SHOULD_AGREE if one.config.get(key) != other.config.get(key)]
    notes = [f"{key} differs between {first!r} and {name!r}; the bundle takes {first!r}'s" for key in differing]
    one_file, other_file = one.folder / "tokenizer.json", other.folder / "tokenizer.json"
    if one_file.exists() and other_file.exists() and one_file.read_bytes() != other_file.read_bytes():
        notes.append(f"tokenizer.json differs between {first!r} and {name!r}; the bundle takes {first!r}'s")
    return notes


def _check_tensors(checkpoints: Mapping[str, Checkpoint], names: Mapping[str, Mapping[str, str]]) -> None:
    first, *others = checkpoints
    for other in others:
        only = [t for t in names[first] if t not in names[other]], [t for t in names[other] if t not in names[first]]
        for missing, have, lack in ((only[0], first, other), (only[1], other, first)):
            if missing:
                raise SourceError(f"expert {lack!r} lacks tensors that {have!r} has: {_some(missing)}")
        pairs = {
            tensor: (checkpoints[first].tensors[names[first][tensor]].shape, checkpoints[other].tensors[source].shape)
            for tensor, source in names[other].items()
        }
        differing = [f"{t} {list(a)} and {list(b)}" for t, (a, b) in pairs.items() if a != b]
        if differing:
            vocabulary = any(a[1:] == b[1:] and len(a) == 2 for a, b in pairs.values() if a != b)
            hint = "; another vocabulary cannot be merged" if vocabulary and len(differing) <= 2 else ""
            raise SourceError(f"experts {first!r} and {other!r} differ in shape: {_some(differing)}{hint}")


def _some(items: list[str], count: int = 3) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def _task(
    recipe: Recipe, record: LayerRecord, checkpoints: Mapping[str, Checkpoint], sources: Mapping[str, str]
) -> TensorTask:
    for expert, source in sources.items():
        info = checkpoints[expert].tensors[source]
        if info.dtype is None and record.known:
            raise SourceError(
                f"expert {expert!r}: tensor {source!r} is stored as {info.stored_as}; "
                "quantised checkpoints must be dequantised first"
            )
    first = next(iter(sources))
    shape = checkpoints[first].tensors[sources[first]].shape
    if not record.known:
        return TensorTask(record, shape, "copy", 0, sources)
    if record.role != "linear":
        setting = {"embedding": recipe.embeddings, "lm_head": recipe.lm_head}.get(record.role, recipe.norms)
        return TensorTask(record, shape, setting, 0, sources)
    rows, columns = shape
    if not factors_are_smaller(rows, columns, rank_for_rate(rows, columns, recipe.compress_rate)):
        return TensorTask(record, shape, "full", 0, sources)
    rank = code_of(recipe.code, torch.float32).rank(rows, columns, recipe.compress_rate)
    return TensorTask(record, shape, "low_rank" if rank else "average", rank, sources)


def _dtype(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], tasks: tuple[TensorTask, ...]) -> torch.dtype:
    if recipe.dtype:
        return DTYPES[recipe.dtype]
    linear = next((t for t in tasks if t.record.role == "linear"), tasks[0])
    found = {e: checkpoints[e].tensors[source].dtype or torch.float32 for e, source in linear.sources.items()}
    if len(set(found.values())) > 1:
        kinds = ", ".join(f"{e}: {dtype_name(d)}" for e, d in found.items())
        raise SourceError(f"the experts are stored in different dtypes ({kinds}); say `dtype:` in the recipe")
    dtype = next(iter(found.values()))
    return torch.float32 if dtype == torch.float64 else dtype
