"""Who fits whom, and which tensor of a checkpoint is which of the bundle.

For `merge`, `add` and `verify` alike: all three ask here and nowhere else. Knows configurations, names, shapes and
dtypes. Reads no weight, and does not know how a tensor is stored (`polymerge.merging.treatment`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.layer import BundleLayer
from ..errors import SourceError
from ..model.positions import objection
from ..recipe.merge import BaseKind
from ..sources.checkpoint import Checkpoint, read_json
from ..sources.configuration import first_difference, paddings_of, positions_of, resolved, settings_of
from ..sources.fused import by_matrices
from ..sources.layers import LayerMap, LayerRecord, meta_model
from .padding import padding_matters


@dataclass(frozen=True)
class Expert:
    """A checkpoint that shall be in a bundle, under its name there."""

    name: str
    checkpoint: Checkpoint
    layer_map: LayerMap

    @property
    def table_rows(self) -> int:
        """Rows of its input embedding, or of the head where that stands for it; 0 where it has none."""
        table = self.layer_map.embedding or self.layer_map.lm_head
        return self.checkpoint.tensors[table].shape[0] if table else 0


def expert_of(
    name: str, checkpoint: Checkpoint, *, trust_remote_code: bool = False, frame: Frame | None = None
) -> Expert:
    """A checkpoint as a merge sees it: every matrix of a mixture of experts is a tensor.

    Args:
        frame: what the bundle has that it shall be in; what that holds as one tensor stays one.

    Raises:
        SourceError: as `map_layers`.
    """
    whole = frame.slots.keys() if frame else ()
    return Expert(name, *by_matrices(checkpoint, trust_remote_code=trust_remote_code, whole=whole))


@dataclass(frozen=True)
class Slot:
    """A tensor that every expert of a bundle has, and what is stored for all of a linear one."""

    record: LayerRecord
    shape: tuple[int, ...]
    base: BaseKind = "average"


@dataclass(frozen=True)
class Frame:
    """What all experts of a bundle have in common: those of one of them, or those of the bundle that is there.

    Attributes:
        expert: whose they are; None for a bundle's.
        folder: where configuration and tokenizer lie.
        slots: the bundle's name of a tensor -> the tensor.
        lm_head: the tensor of the output head; None where that is the input embedding.
    """

    expert: str | None
    folder: Path
    config: Mapping[str, Any]
    slots: Mapping[str, Slot]
    lm_head: str | None

    @property
    def label(self) -> str:
        return f"the bundle {self.folder}" if self.expert is None else f"expert {self.expert!r}"


def frame_of(expert: Expert, widest: Expert | None = None) -> Frame:
    """What others must have to be merged with this expert. A head that is stored beside the embedding that it is tied
    to is left out.

    Args:
        widest: the expert whose tables have the most rows; the frame's have as many.
    """
    layer_map, tensors = expert.layer_map, expert.checkpoint.tensors
    left_out = layer_map.lm_head if layer_map.tied else None
    slots = {n: Slot(layer_map.records[n], info.shape) for n, info in tensors.items() if n != left_out}
    if widest is not None and widest.table_rows > expert.table_rows:
        slots = _widened(slots, expert, widest)
    head = None if layer_map.tied else layer_map.lm_head
    return Frame(expert.name, expert.checkpoint.folder, expert.checkpoint.config, slots, head)


def frame_of_bundle(bundle: Bundle) -> Frame:
    """What an expert must have to be added to a bundle, and what each of its experts has."""
    slots = {layer.tensor: Slot(record_of_bundle(layer), layer.shape, layer.base) for layer in bundle.manifest.layers}
    head = next((layer.tensor for layer in bundle.manifest.layers if layer.role == "lm_head"), None)
    return Frame(None, bundle.path, read_json(bundle.path / "config.json"), slots, head)


def check_settings(frame: Frame, expert: Expert, *, trust_remote_code: bool = False) -> None:
    """Whether weights of this expert mean the same in the frame's model. Defaults are filled in before two
    configurations are compared; positions may differ, where the architecture lets them follow the rows.

    Raises:
        SourceError: a setting differs with which the same weights are another model; names it and both values.
    """
    folder, config = expert.checkpoint.folder, expert.checkpoint.config
    pair = f"{frame.label} and expert {expert.name!r}"
    kinds = [frame.config.get("architectures"), config.get("architectures")]
    if kinds[0] != kinds[1]:
        raise SourceError(f"{pair} have different architectures: {kinds[0]} and {kinds[1]}")
    one, other = resolved(frame.folder, frame.config), resolved(folder, config)
    settings, others = settings_of(one), settings_of(other)
    key = first_difference(settings, others)
    if key is not None:
        raise SourceError(f"{pair} differ in {key}: {settings.get(key)} and {others.get(key)}")
    _check_padding(pair, one, other)
    moved = first_difference(positions_of(one), positions_of(other))
    if moved is None:
        return
    models = [meta_model(place, trust_remote_code=trust_remote_code) for place in (frame.folder, folder)]
    unknown = "transformers does not know the architecture"
    reason = objection(models[0], models[1]) if models[0] and models[1] else unknown
    if reason:
        values = f"{positions_of(one).get(moved)} and {positions_of(other).get(moved)}"
        raise SourceError(f"{pair} differ in {moved}: {values}; they cannot be held apart, because {reason}")


def _check_padding(pair: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    paddings, others = paddings_of(one), paddings_of(other)
    key = first_difference(paddings, others)
    if key is not None and padding_matters(one):
        values = f"{paddings.get(key)} and {others.get(key)}"
        raise SourceError(f"{pair} differ in {key}: {values}; this architecture counts positions from it")


def table_rows_in(frame: Frame, expert: Expert) -> int:
    """Rows of the frame's table that is this expert's embedding; 0 where it has none."""
    table = expert.layer_map.embedding or expert.layer_map.lm_head
    record = expert.layer_map.records[table] if table else None
    of = {(slot.record.module, slot.record.parameter): slot.shape[0] for slot in frame.slots.values() if slot.shape}
    return of.get((record.module, record.parameter), 0) if record else 0


def names_in(frame: Frame, expert: Expert) -> dict[str, str]:
    """The bundle's name of every tensor -> its name in the expert's checkpoint.

    Names may differ by the model's prefix; where the expert's head is its embedding, that stands for the bundle's head.

    Raises:
        SourceError: a tensor of one is missing in the other, has another shape, or a type that cannot be used.
    """
    layer_map = expert.layer_map
    elsewhere = {(r.module, r.parameter): r.tensor for r in layer_map.records.values() if r.tensor not in frame.slots}
    names = {}
    for tensor, slot in frame.slots.items():
        source = elsewhere.get((slot.record.module, slot.record.parameter))
        source = tensor if tensor in layer_map.records else source
        if tensor == frame.lm_head and layer_map.tied:
            source = layer_map.embedding
        if source is not None:
            names[tensor] = source
    _check_names(frame, expert, names)
    _check_shapes(frame, expert, names)
    _check_dtypes(expert, names)
    return names


def sources_in(frame: Frame, experts: Sequence[Expert]) -> dict[str, dict[str, str]]:
    """The bundle's name of every tensor -> expert -> its name in that one's checkpoint. Raises as `names_in`."""
    names = {expert.name: names_in(frame, expert) for expert in experts}
    return {tensor: {expert: names[expert][tensor] for expert in names} for tensor in frame.slots}


def _widened(slots: Mapping[str, Slot], expert: Expert, widest: Expert) -> dict[str, Slot]:
    """The slots with tables of as many rows as another expert's."""
    shapes = {(r.module, r.parameter): widest.checkpoint.tensors[n].shape for n, r in widest.layer_map.records.items()}

    def widened(slot: Slot) -> Slot:
        wide = (widest.table_rows, *slot.shape[1:])
        follows = slot.record.role != "linear" and slot.shape[:1] == (expert.table_rows,)
        # A head that is missing there is the embedding.
        there = shapes.get((slot.record.module, slot.record.parameter), wide)
        return replace(slot, shape=wide) if follows and there == wide else slot

    return {name: widened(slot) for name, slot in slots.items()}


def record_of_bundle(layer: BundleLayer) -> LayerRecord:
    """What a manifest says of a tensor, as a checkpoint's."""
    return LayerRecord(layer.tensor, layer.module, layer.parameter, layer.role, layer.transposed, slice=layer.slice)


def _check_names(frame: Frame, expert: Expert, names: Mapping[str, str]) -> None:
    layer_map, label = expert.layer_map, f"expert {expert.name!r}"
    missing = [tensor for tensor in frame.slots if tensor not in names]
    used = {*names.values(), layer_map.lm_head if layer_map.tied else None}
    more = [tensor for tensor in expert.checkpoint.tensors if tensor not in used]
    if missing:
        raise SourceError(f"{label} lacks tensors that {frame.label} has: {_some(missing)}")
    if frame.lm_head is None and layer_map.lm_head in more:
        raise SourceError(
            f"{label} has an output head of its own ({layer_map.lm_head!r}), but in {frame.label} the head is the "
            "embedding, so that it would be lost; merge all of them anew"
        )
    if more:
        raise SourceError(f"{frame.label} lacks tensors that {label} has: {_some(more)}")


def _check_shapes(frame: Frame, expert: Expert, names: Mapping[str, str]) -> None:
    tensors, rows = expert.checkpoint.tensors, table_rows_in(frame, expert)
    if expert.table_rows > rows:
        raise SourceError(
            f"expert {expert.name!r} has {expert.table_rows} tokens, and the tables of {frame.label} {rows} rows; "
            "merge all of them anew"
        )

    def fits(slot: Slot, shape: tuple[int, ...]) -> bool:
        shorter = slot.record.role != "linear" and slot.shape[:1] == (rows,) and shape[:1] == (expert.table_rows,)
        return shape == slot.shape or (shorter and shape[1:] == slot.shape[1:])

    differing = [
        f"{tensor} {list(frame.slots[tensor].shape)} and {list(tensors[source].shape)}"
        for tensor, source in names.items()
        if not fits(frame.slots[tensor], tensors[source].shape)
    ]
    if differing:
        raise SourceError(f"{frame.label} and expert {expert.name!r} differ in shape: {_some(differing)}")


def _check_dtypes(expert: Expert, names: Mapping[str, str]) -> None:
    for source in names.values():
        info = expert.checkpoint.tensors[source]
        if info.dtype is None and expert.layer_map.records[source].known:
            raise SourceError(
                f"expert {expert.name!r}: tensor {source!r} is stored as {info.stored_as}; "
                "quantised checkpoints must be dequantised first"
            )


def _some(items: Sequence[str], count: int = 3) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
