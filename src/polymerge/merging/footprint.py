"""What answering needs in memory: the bundle, the thinker, and the caches of what they read. The one place that counts.

From configurations alone. Knows no weights and runs nothing; activations are not counted, they are small beside these.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..host import DTYPES
from ..model.held import layer_stays_packed, stays_packed
from ..model.quantised import share_of_bytes
from ..model.remembered import Remembered, remembered
from ..model.stored import orders_of
from ..recipe.response import ThinkerSettings
from ..sources.checkpoint import Checkpoint
from ..sources.forms import forms_of
from ..sources.layers import map_layers, meta_model
from ..sources.opening import open_checkpoint
from ..sources.outline import outline
from .plan import MergePlan
from .treatment import TensorTask
from .work import Work


@dataclass(frozen=True)
class Footprint:
    """Bytes.

    Attributes:
        bundle: average and all experts, in the bundle's dtype, with whole tables where files hold a few rows of them;
            the average's linear layers in `base`.
        bundle_cache, thinker_cache: what is kept of `bundle_tokens` and `thinker_tokens` tokens: keys, values, states.
        thinker: its weights; 0 without one in this process.
        limit: what the GPU that was named may give, or else the recipe's `memory_limit`, or None.
        base, thinker_base: how linear layers are held. residuals: how those of linear layers are.
    """

    bundle: int
    bundle_cache: int
    bundle_tokens: int
    thinker: int
    thinker_cache: int
    thinker_tokens: int
    limit: int | None
    base: str = "16bit"
    thinker_base: str = "16bit"
    residuals: str = "decoded"

    @property
    def total(self) -> int:
        """Both models loaded, one of them at work at a time."""
        return self.bundle + self.thinker + max(self.bundle_cache, self.thinker_cache)

    @property
    def fits(self) -> bool | None:
        """Whether it is within the limit; None without one."""
        return None if self.limit is None else self.total <= self.limit

    @property
    def room(self) -> int | None:
        """How many tokens of cache there is room for beside the weights; None without a limit."""
        each = max(_each(self.bundle_cache, self.bundle_tokens), _each(self.thinker_cache, self.thinker_tokens))
        if self.limit is None or not each:
            return None
        return max(0, int((self.limit - self.bundle - self.thinker) / each))

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle_bytes": self.bundle,
            "bundle_cache_bytes": self.bundle_cache,
            "bundle_cache_tokens": self.bundle_tokens,
            "thinker_bytes": self.thinker,
            "thinker_cache_bytes": self.thinker_cache,
            "thinker_cache_tokens": self.thinker_tokens,
            "total_bytes": self.total,
            "limit_bytes": self.limit,
            "fits": self.fits,
            "base": self.base,
            "thinker_base": self.thinker_base,
            "residuals": self.residuals,
            "room_tokens": self.room,
        }


def footprint(plan: MergePlan) -> Footprint:
    """Of the recipe's bundle and thinker.

    Raises:
        SourceError: the thinker's configuration cannot be had.
    """
    settings, work = plan.recipe.thinker, plan.work
    tokens, cache = _cache(plan.first, plan.dtype, work)
    thinker = _thinker(settings) if settings and settings.source else None
    held = settings.base if settings else "16bit"
    dtype = _dtype(thinker) if thinker else torch.float32
    weights = _thinker_bytes(thinker, dtype, held) if thinker else 0
    thinker_tokens, thinker_cache = _cache(thinker, dtype, work) if thinker else (0, 0)
    limit = plan.recipe.memory_limit if work.usable is None else work.usable
    return Footprint(
        held_bytes(plan), cache, tokens, weights, thinker_cache, thinker_tokens, limit, plan.base,
        held if thinker else "16bit", plan.residuals,
    )  # fmt: skip


def _each(cache: int, tokens: int) -> float:
    return cache / tokens if tokens else 0.0


def held_bytes(plan: MergePlan) -> int:
    """Of a loaded bundle. An expert with a few rows of its own has a whole table in memory, with the average's others;
    coded factors are decoded into the bundle's dtype, but for those of linear layers that are packed. Residuals that
    will turn out to be stored as numbers, or to be another expert's too, are counted as all others."""
    decoded = [] if plan.code.peft_readable else [task for task in plan.tasks if task.treatment == "low_rank"]
    if stays_packed(plan.residuals, plan.code):
        modules, orders = _modules_and_orders(plan.first.folder, json.dumps(plan.first.config, sort_keys=True))
        decoded = [
            t
            for t in decoded
            if t.record.role != "linear" or not layer_stays_packed(t.record.module, t.base, modules, orders)
        ]
    more = sum(_decoded_bytes(task, plan) for task in decoded)
    for task in plan.tasks:
        ranges = task.tables.ranges if task.tables and task.treatment == "average" and task.holds_rows else {}
        whole = task.stored_bytes(plan.dtype)
        more += sum(whole - task.expert_bytes(plan.dtype, plan.code, name) for name, rows in ranges.items() if rows)
    linear = sum(task.stored_bytes(plan.dtype) for task in plan.tasks if task.record.role == "linear")
    return plan.write_bytes + more - int(linear * (1 - share_of_bytes(plan.base, plan.dtype)))


@lru_cache(maxsize=2)  # the bundle's and the thinker's
def _architecture(folder: Path, config: str) -> Any:
    """transformers' model without weights; `config` is what the folder says of it."""
    return meta_model(folder)


@lru_cache(maxsize=1)
def _modules_and_orders(folder: Path, config: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the architecture's modules, and its parameters whose rows are stored in another order.

    A plan is weighed for many changes, and its architecture is the same.
    """
    model = _architecture(folder, config)
    if model is None:
        return frozenset(), frozenset()
    return frozenset(dict(model.named_modules(remove_duplicate=False))), frozenset(orders_of(forms_of(model)))


def times_decoded(plan: MergePlan) -> float:
    """What the residuals' factors take when they are decoded, in units of what they take as stored."""
    tasks = [task for task in plan.tasks if task.treatment == "low_rank"]
    stored = sum(plan.code.bytes(*task.matrix_shape, r) for task in tasks for r in task.ranks if r)
    if plan.code.peft_readable or not stored:
        return 1.0
    return 1 + sum(_decoded_bytes(task, plan) for task in tasks) / stored


def _decoded_bytes(task: TensorTask, plan: MergePlan) -> int:
    """What a tensor's residuals take in memory beyond what they take on disk."""
    dtype = (task.dtype or plan.dtype).itemsize
    return sum(r * sum(task.matrix_shape) * dtype - plan.code.bytes(*task.matrix_shape, r) for r in task.ranks if r)


def _thinker(settings: ThinkerSettings) -> Checkpoint:
    source = str(settings.source)
    return outline(source, settings.config) or open_checkpoint(source)


def _thinker_bytes(thinker: Checkpoint, dtype: torch.dtype, base: str) -> int:
    """In memory, its linear layers as `base` has them."""
    linear = {name for name, record in map_layers(thinker).records.items() if record.role == "linear"}
    bytes_of = {name: info.numel * dtype.itemsize for name, info in thinker.tensors.items()}
    saved = sum(count for name, count in bytes_of.items() if name in linear) * (1 - share_of_bytes(base, dtype))
    return sum(bytes_of.values()) - int(saved)


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    stored = next((info.dtype for info in checkpoint.tensors.values() if info.dtype), torch.float32)
    return DTYPES.get(str(checkpoint.config.get("dtype")), stored)


def _cache(checkpoint: Checkpoint, dtype: torch.dtype, work: Work) -> tuple[int, int]:
    """(tokens in work at once, bytes that are kept of them)."""
    kept, longest = _remembered(checkpoint.folder, json.dumps(checkpoint.config, sort_keys=True), dtype)
    tokens = work.tokens(longest)
    return (tokens, work.requests * kept.bytes(tokens // work.requests)) if kept and kept.parts else (0, 0)


@lru_cache(maxsize=4)
def _remembered(folder: Path, config: str, dtype: torch.dtype) -> tuple[Remembered | None, int]:
    """What the folder's architecture keeps of a conversation, and how many tokens it reads (0: not known)."""
    model = _architecture(folder, config)
    if model is None:
        return None, 0
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    return remembered(type(model), model.config, dtype), longest
