"""Experts that need not share a base: their neurons and heads in the order in which they fit the first expert's best.

Before a tensor is read, the architecture is built small and it is tried that a random order of every axis leaves its
answers as they were. Then every expert's orders are found, axis by axis, with one tensor of each of two experts in
memory, and its checkpoint is one that is read in them. The hidden dimension stays as it is. Knows checkpoints, plans;
which axes there are is `polymerge.sources.axes`'s, and what fits best `polymerge.method.align`'s.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.alignment import Alignment, is_aligned, read_alignment
from ..bundle.bundle import Bundle
from ..errors import SourceError
from ..host import pick_device
from ..method.align import best_head_order, best_order, likeness, units
from ..sources.aligned import AlignedCheckpoint, Orders, moves_of
from ..sources.axes import Axis, Member, axes_of, renamed, shapes_of
from ..sources.checkpoint import Checkpoint, architecture_of
from ..sources.dense import dense_model
from ..sources.layers import map_layers, meta_model
from ..sources.opening import open_checkpoint
from .frame import record_of_bundle
from .plan import MergePlan
from .proof import CLOSE, NotSmall, batch_for, random_experts
from .small import small_configs
from .treatment import TensorTask

log = logging.getLogger(__name__)


def aligned(plan: MergePlan) -> MergePlan:
    """The plan, with its experts read as they fit the first best, where its recipe wants that.

    Raises:
        SourceError: an architecture of which no axis is known, or one that a permutation would change.
    """
    if plan.recipe.align is None or plan.alignments:
        return plan
    records = {task.name: task.record for task in plan.tasks}
    axes = axes_of(records, {task.name: task.shape for task in plan.tasks}, plan.first.folder)
    prove_orders(plan.first)
    device = pick_device(plan.recipe.device)
    first, *others = plan.checkpoints
    alignments = {first: Alignment({axis.name: torch.arange(axis.units) for axis in axes}, 0.0, 0.0)}
    checkpoints: dict[str, Checkpoint] = {first: plan.first}
    target = _named(axes, plan.tasks, first)
    for expert in others:
        theirs = _named(axes, plan.tasks, expert)
        checkpoints[expert], alignments[expert] = align_to(plan.first, target, plan.checkpoints[expert], theirs, device)
    heads = sum(bool(axis.groups) for axis in axes)
    note = f"aligned by permutation: {len(axes) - heads} MLPs and {heads} attentions; the hidden dimension as it was"
    return replace(plan, checkpoints=checkpoints, alignments=alignments, notes=(*plan.notes, note))


def aligned_to_bundle(
    bundle: Bundle, checkpoint: Checkpoint, tasks: Sequence[TensorTask], device: torch.device
) -> tuple[Checkpoint, Alignment | None]:
    """An expert that is to be added, as it fits the average best, and how; where no expert is aligned, as it is.

    Raises:
        SourceError: as `aligned`.
    """
    if not is_aligned(bundle.manifest):
        return checkpoint, None
    axes = _axes_of_bundle(bundle)
    prove_orders(checkpoint)
    [expert] = tasks[0].sources
    return align_to(bundle.base, axes, checkpoint, _named(axes, tasks, expert), device)


def as_in_bundle(bundle: Bundle, expert: str, checkpoint: Checkpoint, tasks: Sequence[TensorTask]) -> Checkpoint:
    """An expert's source in the order in which the bundle has it.

    Raises:
        SourceError: the bundle's orders are none that leave the expert as it is.
    """
    alignment = read_alignment(bundle.path, bundle.manifest, expert)
    if alignment is None:
        return checkpoint
    axes = _named(_axes_of_bundle(bundle), tasks, expert)
    return AlignedCheckpoint(checkpoint, moves_of(axes, alignment.orders))


def _axes_of_bundle(bundle: Bundle) -> tuple[Axis, ...]:
    records = {layer.tensor: record_of_bundle(layer) for layer in bundle.manifest.layers}
    return axes_of(records, {layer.tensor: layer.shape for layer in bundle.manifest.layers}, bundle.path)


def align_to(
    target: Checkpoint, target_axes: Sequence[Axis], checkpoint: Checkpoint, axes: Sequence[Axis], device: torch.device
) -> tuple[AlignedCheckpoint, Alignment]:
    """A checkpoint as it fits another best.

    Args:
        target_axes, axes: the same, by the names of the one and of the other.
    """
    orders = {}
    for one, other in zip(target_axes, axes, strict=True):
        orders[one.name] = _order(target, one, checkpoint, other, device)
        log.info("%s: %s aligned", checkpoint.label, one.name)
    moves = moves_of(axes, orders)
    ordered = AlignedCheckpoint(checkpoint, moves)
    pairs = {
        b.tensor: a.tensor
        for one, other in zip(target_axes, axes, strict=True)
        for a, b in zip((*one.members, *one.group_members), (*other.members, *other.group_members), strict=True)
    }
    before, after = (_distance(target, source, pairs) for source in (checkpoint, ordered))
    return ordered, Alignment(orders, before, after)


def digest_of_orders(alignments: Mapping[str, Alignment]) -> str:
    """Tells that experts were aligned alike."""
    digest = hashlib.sha256()
    for expert, alignment in alignments.items():
        for name, order in alignment.orders.items():
            digest.update(f"{expert} {name} {order.tolist()}\n".encode())
    return digest.hexdigest()


def prove_orders(checkpoint: Checkpoint) -> None:
    """Tries on a small model of the architecture that other orders of all axes leave its answers as they were.

    Raises:
        SourceError: they do not, or there is no small model to try it on.
    """
    model = meta_model(checkpoint.folder)
    if model is None:
        raise SourceError(f"align: transformers does not know {architecture_of(checkpoint.config)}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name, reason = type(model).__name__, "no small configuration"
    for settings in small_configs(json.loads(json.dumps(model.config.to_dict(), default=str)), parameters):
        try:
            far = _change_by_orders(json.dumps(settings, sort_keys=True))
        except NotSmall as error:
            reason = str(error)
            continue
        if not far <= CLOSE:
            raise SourceError(
                f"align: other orders of neurons and heads change the answers of a small {name} by {far:.2g}; leave "
                "`align` out"
            )
        return
    raise SourceError(f"align: {name} could not be built small to be tried ({reason}); leave `align` out")


@functools.cache
def _change_by_orders(settings: str) -> float:
    """Largest difference of two logits, relative to the largest logit. Raises NotSmall."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), torch.random.fork_rng(devices=[]):
        checkpoint = open_checkpoint(str(random_experts(json.loads(settings), Path(folder))["one"]))
        axes, generator = axes_of_checkpoint(checkpoint), torch.Generator().manual_seed(2)
        shuffled = AlignedCheckpoint(checkpoint, moves_of(axes, random_orders(axes, generator)))
        answers: list[Tensor] = []
        for source in (checkpoint, shuffled):
            model: Any = dense_model(source, dtype=torch.float32).eval()
            answers.append(model(**batch_for(model)).logits)
    return float((answers[0] - answers[1]).abs().max() / answers[0].abs().max())


def axes_of_checkpoint(checkpoint: Checkpoint) -> tuple[Axis, ...]:
    """The axes of a checkpoint by itself. Raises as `axes_of` and `map_layers`."""
    return axes_of(map_layers(checkpoint).records, shapes_of(checkpoint), checkpoint.folder)


def random_orders(axes: Sequence[Axis], generator: torch.Generator) -> Orders:
    """An order of every axis by chance, groups of heads whole."""
    orders = {}
    for axis in axes:
        groups = axis.groups or axis.units
        inside = [torch.randperm(axis.units // groups, generator=generator) for _ in range(groups)]
        outer = torch.randperm(groups, generator=generator)
        orders[axis.name] = torch.cat([outer[g] * len(inside[g]) + inside[g] for g in range(groups)])
    return orders


def _order(first: Checkpoint, one: Axis, checkpoint: Checkpoint, other: Axis, device: torch.device) -> Tensor:
    products = _products(first, one.members, checkpoint, other.members, device)
    if not one.groups:
        return best_order(products)
    return best_head_order(products, _products(first, one.group_members, checkpoint, other.group_members, device))


def _products(
    first: Checkpoint, ones: Sequence[Member], checkpoint: Checkpoint, others: Sequence[Member], device: torch.device
) -> Tensor:
    """[units, units], summed over the tensors; one of each checkpoint is in memory at a time."""
    count = ones[0].places.shape[0]
    total = torch.zeros(count, count, device=device)
    for one, other in zip(ones, others, strict=True):
        a = units(first.read(one.tensor).to(device), one.dim, one.places.to(device))
        b = units(checkpoint.read(other.tensor).to(device), other.dim, other.places.to(device))
        total += likeness(a, b)
    return total


def _distance(target: Checkpoint, checkpoint: Checkpoint, pairs: Mapping[str, str]) -> float:
    """||W - W_1|| / ||W_1|| over the tensors."""
    apart = whole = 0.0
    for tensor, there in pairs.items():
        one = target.read(there).float()
        apart += float((checkpoint.read(tensor).float() - one).double().square().sum())
        whole += float(one.double().square().sum())
    return (apart / whole) ** 0.5 if whole else 0.0


def _named(axes: Sequence[Axis], tasks: Sequence[TensorTask], expert: str) -> list[Axis]:
    names = {task.name: task.sources[expert] for task in tasks}
    return [renamed(axis, names) for axis in axes]
