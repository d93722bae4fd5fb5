"""How each tensor of a bundle is stored, and at which rank.

For `merge`, `add` and `verify` alike: all three ask here and nowhere else. Knows what a tensor is and its shape; which
of a checkpoint's it is, is `polymerge.merging.frame`'s. Knows nothing of what a merge costs (`polymerge.merging.plan`)
nor of the arithmetic (`polymerge.merging.compress`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ..bundle.manifest import Method
from ..method.code import Code
from ..method.codes import code_of
from ..method.rsvd import factors_are_smaller, rank_for_rate
from ..recipe.merge import BaseKind, Recipe
from ..recipe.rates import rate_of
from ..sources.layers import LayerRecord
from .frame import Expert, Frame, Slot, sources_in
from .vocabulary import Tables

Treatment = Literal["low_rank", "full", "average", "keep", "copy"]
# expert -> rank and dtype of the factors of its adapter; of rank 0 where it has none there.
Adapters = Mapping[str, tuple[int, torch.dtype]]
# What says how tensors are stored: a recipe, and the manifest of the bundle that was made of one.
Settings = Recipe | Method


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
        dtype: what it is stored in, where that is not the bundle's (`polymerge.merging.precision`).
        tables: of a tensor with a row a token, where experts have other rows or tokens.
        base: what the stored tensor is, of a linear weight.
        adapters: of experts that are stored as their adapters' factors over it (`polymerge.merging.adapters`), or that
            have nothing but the base's.
    """

    record: LayerRecord
    shape: tuple[int, ...]
    treatment: Treatment
    rank: int
    sources: Mapping[str, str]
    as_difference: bool = False
    dtype: torch.dtype | None = None
    tables: Tables | None = None
    base: BaseKind = "average"
    adapters: Adapters = field(default_factory=dict)

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

    @property
    def against_base(self) -> bool:
        """Whether it is stored by the method, against the base: a linear weight, or a table that has residuals."""
        return self.record.role == "linear" or self.treatment == "low_rank"

    @property
    def is_table(self) -> bool:
        """An embedding or a head: most of what experts may keep of their own."""
        return self.record.role in ("embedding", "lm_head")

    @property
    def holds_rows(self) -> bool:
        """Whether an expert's file may hold a few rows of it: PEFT has a place for an embedding's alone. Beside
        residuals of a table PEFT is out already."""
        return self.record.role == "embedding" or self.treatment == "low_rank"

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the experts' residuals, at most."""
        return tuple(self.adapters[e][0] if e in self.adapters else self.rank for e in self.sources)

    def stored_bytes(self, dtype: torch.dtype) -> int:
        """Of one whole tensor, in a bundle of this dtype."""
        return self.numel * (self.dtype or dtype).itemsize

    def expert_bytes(self, dtype: torch.dtype, code: Code, expert: str) -> int:
        """What an expert's adapter stores for this tensor, at most."""
        if expert in self.adapters:
            rank, its = self.adapters[expert]
            return code_of(code.name, its).bytes(*self.matrix_shape, rank) if rank else 0
        if self.treatment in ("full", "keep"):
            return self.stored_bytes(dtype)
        residual = code.bytes(*self.matrix_shape, self.rank) if self.treatment == "low_rank" else 0
        if self.treatment in ("average", "low_rank") and self.tables and self.tables.most_own:
            rows = self.tables.most_own if self.holds_rows else self.shape[0]
            return residual + self.stored_bytes(dtype) // self.shape[0] * rows
        return residual


def adapter_key(task: TensorTask, suffix: str | None = None) -> str:
    """The key in an expert's adapter file, without PEFT's prefix."""
    return f"{task.record.module}.{suffix or task.record.parameter}"


def tasks_for(
    frame: Frame,
    experts: Sequence[Expert],
    settings: Settings,
    tables: Tables | None = None,
    names: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[TensorTask, ...]:
    """What happens to every tensor of the experts. Raises SourceError as `names_in` does.

    Args:
        tables: the rows of experts whose vocabularies differ.
        names: what `sources_in` gave, where it was asked already.
    """
    tasks = []
    for tensor, sources in (names or sources_in(frame, experts)).items():
        slot = frame.slots[tensor]
        # A manifest does not say which tensors the model does not know, or computes with in float32; checkpoints do.
        records = [expert.layer_map.records[sources[expert.name]] for expert in experts]
        known, wide = all(record.known for record in records), any(record.float32 for record in records)
        task = task_of(replace(slot.record, known=known, float32=wide), slot.shape, sources, settings)
        is_table = any(_is_table(slot, expert, sources[expert.name]) for expert in experts)
        tasks.append(replace(task, tables=tables if is_table else None, base=slot.base))
    return with_differences(tasks)


def task_of(record: LayerRecord, shape: tuple[int, ...], sources: Mapping[str, str], settings: Settings) -> TensorTask:
    """What happens to one tensor, before `with_differences`."""
    return TensorTask(record, shape, *treatment_of(record, shape, settings), sources)


def treatment_of(record: LayerRecord, shape: tuple[int, ...], settings: Settings) -> tuple[Treatment, int]:
    """How a tensor is stored, and the rank of its residuals (0 where it has none)."""
    if not record.known:
        return "copy", 0
    if record.role != "linear":
        chosen = {"embedding": settings.embeddings, "lm_head": settings.lm_head}.get(record.role, settings.norms)
        assert chosen != "auto", "a plan settles the recipe (polymerge.recipe.automatic)"
        return _compressed_table(record, shape, settings) if chosen == "compress" else (chosen, 0)
    rows, columns = shape
    rate = rate_of(settings.compress_rate, record.module, record.tensor)
    # At rate 1 nothing is kept of a residual, however small the matrix is.
    if rate < 1 and not factors_are_smaller(rows, columns, rank_for_rate(rows, columns, rate)):
        return "full", 0
    rank = code_of(settings.code, torch.float32).rank(rows, columns, rate)
    return ("low_rank" if rank else "average"), rank


def _compressed_table(record: LayerRecord, shape: tuple[int, ...], settings: Settings) -> tuple[Treatment, int]:
    """Of an embedding or a head. One that is too small for factors is kept: it costs next to nothing."""
    rate = rate_of(settings.embedding_rate, record.module, record.tensor)
    if rate == 1:
        return "average", 0
    if len(shape) != 2 or not factors_are_smaller(*shape, rank_for_rate(*shape, rate)):
        return "keep", 0
    rank = code_of(settings.code, torch.float32).rank(*shape, rate)
    return ("low_rank" if rank else "keep"), rank


def with_differences(tasks: Sequence[TensorTask]) -> tuple[TensorTask, ...]:
    """Biases beside a weight that is stored against the base are stored against the base's too."""
    stored = (task for task in tasks if task.against_base)
    against_base = {task.record.module for task in stored if task.treatment in ("low_rank", "average")}
    biases = {t.name for t in tasks if t.record.parameter == "bias" and t.record.module in against_base}
    heads = {task.record.module for task in tasks if task.record.role == "lm_head" and task.tables}
    biases -= {t.name for t in tasks if t.record.module in heads}  # theirs have a row a token
    return tuple(replace(t, as_difference=True, tables=None) if t.name in biases else t for t in tasks)


def _is_table(slot: Slot, expert: Expert, source: str) -> bool:
    """Whether a tensor has a row a token: an embedding, a head or a bias with as many rows, or one that differs."""
    shape = expert.checkpoint.tensors[source].shape
    return shape != slot.shape or (
        slot.record.role in ("embedding", "lm_head", "bias") and shape[:1] == (expert.table_rows,)
    )
