"""What a merge will do, from configurations and headers alone: which tensors, which ranks, how many bytes.

Which experts fit each other is `polymerge.merging.frame`'s, what happens to each of their tensors
`polymerge.merging.treatment`'s; nothing is read here but headers, and nothing is known of how tensors are compressed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch

from ..bundle.alignment import Alignment
from ..bundle.files import SLAB_NUMEL
from ..bundle.manifest import MANIFEST
from ..errors import RecipeError, SourceError
from ..host import dtype_name
from ..method.code import Code
from ..method.codes import code_of
from ..method.weights import Weights
from ..model.held import held_as
from ..model.quantised import base_of
from ..paths import here
from ..recipe.automatic import settled
from ..recipe.merge import EMBEDDING_RATE, Recipe, RecipeLike, RecipeSettings, load_recipe
from ..recipe.rates import misfit
from ..sources.axes import axes_of, shapes_of
from ..sources.checkpoint import Checkpoint, architecture_of
from ..sources.layers import LayerMap
from ..sources.memory import refuse_models
from ..sources.opening import open_source
from ..sources.outline import OutlineCheckpoint, outline
from .calibration import Calibration
from .foundation import over_adapters, plain_adapters, with_adapters
from .frame import check_settings, expert_of, frame_of, sources_in
from .personas import Personas, personas_of
from .precision import bundle_dtype, with_dtypes
from .treatment import TensorTask, Treatment, task_of, tasks_for, with_differences
from .vocabulary import Tables, merged_tables
from .work import Work, work_of


@dataclass(frozen=True)
class MergePlan:
    """A checked merge. Sizes in bytes; `keep` tensors count as if no two experts shared one.

    Attributes:
        recipe: with what its `auto`s stand for.
        tables: the rows of experts whose vocabularies differ; None where all have one.
        alignments: expert -> how it was aligned, once it was (`polymerge.merging.align`).
        calibration: what counts of the residuals, of experts for which that is known.
        base: how answering will hold the average in memory.
        work: what it will do at once, and where.
    """

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    layer_map: LayerMap
    tasks: tuple[TensorTask, ...]
    dtype: torch.dtype
    tied: bool
    notes: tuple[str, ...]
    personas: Personas
    tables: Tables | None = None
    alignments: Mapping[str, Alignment] = field(default_factory=dict)
    calibration: Calibration | None = None
    base: str = "16bit"
    residuals: str = "decoded"
    work: Work = field(default_factory=Work)

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

    def weights(self, task: TensorTask) -> dict[str, Weights]:
        """Expert -> what counts of its residual of a tensor, where that is known."""
        return self.calibration.of(task) if self.calibration else {}

    @property
    def base_bytes(self) -> int:
        return sum(task.stored_bytes(self.dtype) for task in self.tasks)

    @property
    def residual_bytes(self) -> int:
        """Of one expert's low-rank factors: of the largest."""
        return max(self._expert_bytes(expert, "low_rank") for expert in self.checkpoints)

    @property
    def own_bytes(self) -> int:
        """Of one expert's own whole tensors, at most."""
        return max(self._expert_bytes(expert, "full", "keep", "average") for expert in self.checkpoints)

    @property
    def write_bytes(self) -> int:
        kinds: tuple[Treatment, ...] = ("low_rank", "full", "keep", "average")
        return self.base_bytes + sum(self._expert_bytes(expert, *kinds) for expert in self.checkpoints)

    @property
    def shared_bytes(self) -> int:
        """What is counted twice in `write_bytes`: two experts have one residual between them, up to a scale, unless
        rounding gives the second a better one of its own."""
        if len(self.checkpoints) != 2:
            return 0
        _, second = self.checkpoints
        between = (t for t in self.tasks if t.treatment == "low_rank" and t.base == "average")
        return sum(t.expert_bytes(self.dtype, self.code, second) for t in between)

    def _expert_bytes(self, expert: str, *treatments: Treatment) -> int:
        return sum(t.expert_bytes(self.dtype, self.code, expert) for t in self.tasks if t.treatment in treatments)

    @property
    def read_bytes(self) -> int:
        """Every tensor is read twice: for the average, then for the residuals against it. Own whole tensors that differ
        are read a third time, mostly from the system's cache."""
        infos = (c.tensors[t.sources[e]] for e, c in self.checkpoints.items() for t in self.tasks)
        return 2 * sum(info.numel * (info.dtype or torch.float32).itemsize for info in infos)

    @property
    def memory_bytes(self) -> int:
        """Estimate of the arithmetic's peak: for a linear weight the base, a residual and its copy in float32; of other
        tensors some rows of two. With several workers as many results wait for their turn."""
        linear = max((t.numel for t in self.tasks if t.against_base), default=0)
        rows = min(max((t.numel for t in self.tasks), default=0), SLAB_NUMEL)
        waiting = (self.recipe.workers + 1) * linear * self.dtype.itemsize if self.recipe.workers > 1 else 0
        return max(self.recipe.workers * linear * 4 * 4 + waiting, rows * 4 * 3)

    def summary(self) -> dict[str, Any]:
        """The plan as plain data (`polymerge plan --json`)."""
        experts = len(self.checkpoints)
        source = sum(t.numel for t in self.tasks) * self.dtype.itemsize
        ranks = sorted({rank for t in self.tasks if t.treatment == "low_rank" for rank in t.ranks if rank})
        return {
            "experts": {name: c.label for name, c in self.checkpoints.items()},
            "architecture": architecture_of(self.first.config),
            "layers_from": self.layer_map.layers_from,
            "compress_rate": self.recipe.compress_rate,
            "code": self.recipe.code,
            "dtype": dtype_name(self.dtype),
            "tensors": len(self.tasks),
            "over_adapters_base": sum(t.base == "adapters" for t in self.tasks),
            "compressed_tensors": sum(t.treatment == "low_rank" for t in self.tasks),
            "ranks": [ranks[0], ranks[-1]] if ranks else [],
            "separate_models_bytes": experts * source,
            "base_bytes": self.base_bytes,
            "residual_bytes_per_expert": self.residual_bytes,
            "own_bytes_per_expert": self.own_bytes,
            "write_bytes": self.write_bytes,
            "shared_bytes": self.shared_bytes,
            "read_bytes": self.read_bytes,
            "memory_bytes": self.memory_bytes,
            "personas": {name: list(groups) for name, groups in self.personas.groups.items() if groups},
            "notes": [*self.notes, *self.personas.hints],
        }


def plan_merge(
    recipe: RecipeLike,
    *,
    weights: bool = True,
    base: str = "16bit",
    residuals: str = "decoded",
    gpu: int | str | None = None,
    context: int | None = None,
    requests: int = 1,
    **settings: Unpack[RecipeSettings],
) -> MergePlan:
    """Opens every source, checks that they fit each other and decides each tensor's treatment.

    Args:
        recipe, settings: as for `load_recipe`.
        weights: off, hub ids are not downloaded: their tensors are taken from their configuration, or from the
            recipe's `config`. Such a plan says sizes; it cannot be merged.
        base, residuals: how answering will hold the average and residuals in memory, as `load_model` takes them; for
            `footprint` alone, as are
        gpu: bytes of memory, a text such as `24GB`, or `auto`; what `cheapest_change` makes it fit;
        context, requests: tokens of a conversation, by default the model's context, and how many go on at once.

    Raises:
        RecipeError: the recipe cannot be used. SourceError: naming the first tensors or settings that differ.
        DeviceError: `auto`, and no GPU is here.
    """
    refuse_models(recipe)
    recipe, base, work = load_recipe(recipe, **settings), base_of(base), work_of(gpu, context, requests)
    opened = _all_opened(recipe, weights)
    experts = [expert_of(n, c, trust_remote_code=recipe.trust_remote_code) for n, c in opened.items()]
    checkpoints = {expert.name: expert.checkpoint for expert in experts}
    first = experts[0]
    notes = [*first.layer_map.notes, *_bundle_notes(checkpoints)]
    outlined = [name for name, checkpoint in opened.items() if isinstance(checkpoint, OutlineCheckpoint)]
    if outlined:
        shown = recipe.config or "the hub's config.json"
        notes.append(f"sizes of {', '.join(outlined)} are from {shown} alone; no weight was looked at")
    for expert in experts[1:]:
        check_settings(frame_of(first), expert, trust_remote_code=recipe.trust_remote_code)
    if recipe.align is not None:
        axes_of(first.layer_map.records, shapes_of(first.checkpoint), first.checkpoint.folder)
    personas = personas_of(checkpoints)
    notes += personas.notes
    untied = next((expert for expert in experts if not expert.layer_map.tied), None)
    reference = untied or first
    widest = max(experts, key=lambda expert: expert.table_rows)
    frame = frame_of(reference, widest)
    names = sources_in(frame, experts)
    adapters = over_adapters(names.values(), checkpoints, recipe)
    recipe = settled(recipe, adapters=adapters)
    sizes = {expert.name: expert.table_rows for expert in experts}
    averaged, trust = {recipe.embeddings, recipe.lm_head} != {"keep"}, recipe.trust_remote_code
    tables, unread = merged_tables(personas, sizes, averaged=averaged, trust_remote_code=trust)
    notes += [*_vocabulary_notes(first.name, tables), *([unread] if unread else [])]
    tasks = tasks_for(frame, experts, recipe, tables, names)
    _check_rates(recipe, tasks)
    dtype = bundle_dtype(recipe, checkpoints, tasks)
    tasks = with_dtypes(with_adapters(tasks, checkpoints, recipe), checkpoints, dtype)
    notes += _adapter_notes(tasks, checkpoints)
    tied = untied is None
    return MergePlan(
        recipe,
        checkpoints,
        reference.layer_map,
        tasks,
        dtype,
        tied,
        tuple(notes),
        personas,
        tables,
        base=base,
        residuals=held_as(residuals),
        work=work,
    )


def _check_rates(recipe: Recipe, tasks: Sequence[TensorTask]) -> None:
    linear = (task.record for task in tasks if task.record.role == "linear")
    tables = (task.record for task in tasks if task.record.role in ("embedding", "lm_head"))
    for key, records in (("compress_rate", linear), ("embedding_rate", tables)):
        reason = misfit(getattr(recipe, key), [(record.module, record.tensor) for record in records])
        if reason:
            raise RecipeError(recipe.place_of_key(key) + reason)
    if recipe.embedding_rate != EMBEDDING_RATE and "compress" not in (recipe.embeddings, recipe.lm_head):
        raise RecipeError(
            f"{recipe.place_of_key('embedding_rate')}nothing is compressed at it (embeddings: {recipe.embeddings}, "
            f"lm_head: {recipe.lm_head}, code: {recipe.code}); leave it out, or say `embeddings: compress`"
        )


def replanned(plan: MergePlan, **settings: Unpack[RecipeSettings]) -> MergePlan:
    """The same experts at another rate, with another code or other choices for tables, without opening them again."""
    recipe = plan.recipe.model_copy(update=dict(settings))
    tasks = [replace(task_of(t.record, t.shape, t.sources, recipe), dtype=t.dtype, tables=t.tables) for t in plan.tasks]
    return replace(plan, recipe=recipe, tasks=with_adapters(with_differences(tasks), plan.checkpoints, recipe))


def _bundle_notes(checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """A bundle is a checkpoint, too: the average's."""
    return [
        f"expert {name!r} is the average of the bundle {checkpoint.folder}; for one of its experts: polymerge export "
        f"{checkpoint.folder} --expert NAME --to dense"
        for name, checkpoint in checkpoints.items()
        if checkpoint.in_folder and (checkpoint.folder / MANIFEST).is_file()
    ]


def _adapter_notes(tasks: Sequence[TensorTask], checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Says what a merge of adapters is, and what would do without one."""
    notes = []
    if any(task.base == "adapters" for task in tasks):
        notes.append(
            "the experts are adapters over one model: that model is the bundle's base, and every expert its adapter's "
            "own factors, exactly (`adapters: average` in the recipe has the published average instead)"
        )
    if plain_adapters(checkpoints, tasks):
        notes.append(
            "plain multi-LoRA would do: PEFT, or vLLM's --lora-modules, serves these adapters over their base as they "
            "are; a bundle adds the router, mixtures and the average, and grows by experts that are no adapters"
        )
    return notes


def _vocabulary_notes(first: str, tables: Tables | None) -> list[str]:
    if tables is None or len(set(tables.sizes.values())) == 1:
        return []
    shown = ", ".join(f"{name} {size}" for name, size in tables.sizes.items())
    return [f"experts have their own vocabularies ({shown}); the average has {first!r}'s"]


def _all_opened(recipe: Recipe, weights: bool) -> dict[str, Checkpoint]:
    """In the recipe's order. What is not on this machine is opened first: that fails soonest, and most often."""
    away_first = sorted(recipe.experts, key=lambda name: here(recipe.experts[name].source) is not None)
    opened = {name: _opened(recipe, name, weights) for name in away_first}
    return {name: opened[name] for name in recipe.experts}


def _opened(recipe: Recipe, expert: str, weights: bool) -> Checkpoint:
    source = recipe.experts[expert]
    outlined = None if weights else outline(source.source, recipe.config, revision=source.revision)
    try:
        return outlined or open_source(source)
    except SourceError as error:
        raise SourceError(f"{recipe.place_of(expert)}{error}") from None
