"""A checkpoint matrix by matrix: whatever it stores as one tensor of a mixture's matrices, seen as one tensor each.

A merge knows matrices alone. A tensor that transformers stores as [E, m, n] is shown in slices. One that it stores one
by one, but that a checkpoint holds as the model does (`save_original_format=False`), is shown as transformers stores
it, so that such a checkpoint and a usual one are the same. Reads only what is asked for. Which tensors these are is
`polymerge.sources.slices`' and transformers' own to say.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SourceError
from .checkpoint import Checkpoint, OverBase, TensorInfo, in_natural_order
from .forms import Part, forms_of
from .layers import LayerMap, LayerRecord, map_layers, meta_model, stored_names
from .slices import Slice, slices_of


class _View(Checkpoint):
    """What is the same of a checkpoint that is seen otherwise."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.label, self.folder, self.config = checkpoint.label, checkpoint.folder, checkpoint.config
        self.origin, self.in_folder = checkpoint.origin, checkpoint.in_folder
        self._checkpoint = checkpoint

    def fingerprint(self) -> list[str]:
        return self._checkpoint.fingerprint()


class SlicedCheckpoint(_View):
    """Another checkpoint, with slices in the place of the tensors that they are of.

    Raises:
        SourceError: such a tensor is missing or has another shape.
    """

    def __init__(self, checkpoint: Checkpoint, slices: Mapping[str, Slice]) -> None:
        super().__init__(checkpoint)
        self._slices = slices
        for part in slices.values():
            info = checkpoint.tensors.get(part.tensor)
            if info is None or info.shape != part.shape:
                what = f"is {list(info.shape)}" if info else "is missing"
                raise SourceError(f"{checkpoint.label}: tensor {part.tensor!r} {what}, expected {list(part.shape)}")
        stacks = {part.tensor for part in slices.values()}
        kept = {name: info for name, info in checkpoint.tensors.items() if name not in stacks}
        cut = {n: replace(checkpoint.tensors[s.tensor], shape=s.matrix_shape) for n, s in slices.items()}
        self.tensors: Mapping[str, TensorInfo] = in_natural_order(kept | cut)

    def read(self, name: str) -> Tensor:
        part = self._slices.get(name)
        if part is None:
            return self._checkpoint.read(name)
        rows = self._checkpoint.read_rows(part.tensor, part.start, part.start + part.rows)
        return rows.reshape(part.matrix_shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        part = self._slices.get(name)
        if part is None:
            return self._checkpoint.read_rows(name, start, stop)
        if len(part.shape) == 2:
            return self._checkpoint.read_rows(part.tensor, part.start + start, min(stop, part.rows) + part.start)
        return self.read(name)[start:stop].clone()

    def over_base(self, name: str) -> OverBase | None:
        return None if name in self._slices else self._checkpoint.over_base(name)


class StoredForm(_View):
    """A checkpoint that holds parameters as a model does, as transformers' `save_pretrained` would store it."""

    def __init__(self, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], forms: Mapping[str, list[Part]]):
        super().__init__(checkpoint)
        there = checkpoint.tensors
        parts_of = {n: p for n, p in forms.items() if n not in there and all(part.parameter in there for part in p)}
        self._names = {n: p[0].parameter for n, p in parts_of.items() if _is_renamed(p, there, shapes[n])}
        self._parts = {name: parts for name, parts in parts_of.items() if name not in self._names}
        used = {part.parameter for parts in parts_of.values() for part in parts}
        kept = {name: info for name, info in there.items() if name not in used}
        made = {n: replace(there[parts[0].parameter], shape=shapes[n]) for n, parts in parts_of.items()}
        self.tensors: Mapping[str, TensorInfo] = in_natural_order(kept | made)

    def read(self, name: str) -> Tensor:
        parts = self._parts.get(name)
        if parts is None:
            return self._checkpoint.read(self._names.get(name, name))
        info = self.tensors[name]
        across = parts[0].transposed
        made = torch.empty((*info.shape[:-2], *info.shape[:-3:-1]) if across else info.shape, dtype=info.dtype)
        rows = made.view(-1, made.shape[-1]) if made.dim() > 1 else made
        for part in parts:
            rows[part.source] = self._rows(part)
        return made.transpose(-1, -2).contiguous() if across else made

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._parts:
            return self._checkpoint.read_rows(self._names.get(name, name), start, stop)
        return self.read(name)[start:stop].clone()

    def _rows(self, part: Part) -> Tensor:
        """The rows of a parameter that a part says, read with as little else as its first dimension allows."""
        shape = self._checkpoint.tensors[part.parameter].shape
        width = 1
        for size in shape[1:-1]:
            width *= size
        first, last = int(part.target.min()) // width, int(part.target.max()) // width + 1
        read = self._checkpoint.read_rows(part.parameter, first, last)
        return (read.view(-1, read.shape[-1]) if len(shape) > 1 else read)[part.target - first * width]


def _is_renamed(parts: Sequence[Part], there: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> bool:
    """Whether a parameter is stored as it is, under another name."""
    first = parts[0]
    same = len(parts) == 1 and not first.transposed and there[first.parameter].shape == shape
    return same and torch.equal(first.source, first.target)


def by_matrices(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False, whole: Container[str] = ()
) -> tuple[Checkpoint, LayerMap]:
    """A checkpoint with every matrix of a mixture as a tensor of its own, and what its tensors are.

    Args:
        whole: tensors that stay as they are.

    Raises:
        SourceError: as `map_layers`.
    """
    layer_map = map_layers(checkpoint, trust_remote_code=trust_remote_code)
    fused = {tensor: what for tensor, what in layer_map.fused.items() if tensor not in whole}
    if any(what.apart for what in fused.values()):
        model = meta_model(checkpoint.folder, trust_remote_code=trust_remote_code)
        assert model is not None, "the architecture said what is stored apart"
        checkpoint = StoredForm(checkpoint, stored_names(model), forms_of(model))
        layer_map = map_layers(checkpoint, trust_remote_code=trust_remote_code)
        fused = {tensor: what for tensor, what in layer_map.fused.items() if tensor not in whole}
    if not fused:
        return checkpoint, layer_map
    slices, records = {}, {n: r for n, r in layer_map.records.items() if n not in fused}
    for tensor, what in fused.items():
        for part in slices_of(tensor, checkpoint.tensors[tensor].shape, what.count):
            slices[part.name] = part
            records[part.name] = LayerRecord(
                part.name, part.name.removesuffix(".weight"), "weight", "linear", what.transposed, slice=part
            )
    return SlicedCheckpoint(checkpoint, slices), replace(layer_map, records=records)
