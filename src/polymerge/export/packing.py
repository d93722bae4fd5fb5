"""Which matrices of a base are stored in fewer bits, in which form, and the weight files that hold them.

One matrix is held at a time. Knows a bundle's layers and files; does not know who rounds (`polymerge.export.rounding`)
or what it costs (`polymerge.export.quantise`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..bundle.base import base_of
from ..bundle.bundle import Bundle
from ..bundle.files import DTYPE_NAMES, Entry, FileEntry, raw_bytes
from ..bundle.layer import BundleLayer
from ..bundle.write import write_weights
from ..errors import ModelError
from ..host import DTYPES
from ..model.mixed import MixedModel
from ..sources.checkpoint import Checkpoint
from ..sources.layers import meta_model
from ..sources.packed import EIGHT_BITS, PACKED, SCALE, SHAPE, Form, four_bits, pack
from .rounding import Calibrated, Nearest, Rounder, Texts, reached

# The stored tensors that are packed, and the linear layers that stay as they are.
Matrices: TypeAlias = tuple[Mapping[str, BundleLayer], Sequence[str]]


@dataclass(frozen=True)
class BaseWay:
    """One way to store a base."""

    bits: int
    calibrated: bool


BASE_WAYS = {
    "int8": BaseWay(8, calibrated=False),
    "gptq-int8": BaseWay(8, calibrated=True),
    "gptq-int4": BaseWay(4, calibrated=True),
}


@dataclass(frozen=True)
class Packing:
    """What is packed, and how.

    Attributes:
        layers: by the tensor that is packed.
        kept: linear layers that stay as they are.
    """

    form: Form
    layers: Mapping[str, BundleLayer]
    kept: Sequence[str]
    rounder: Rounder

    def packed(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        numbers, scale = self.rounder(self.layers[name], weight)
        shape = torch.tensor(weight.shape)
        return {name + PACKED: pack(numbers, self.form), name + SCALE: scale, name + SHAPE: shape}


def packing_of(bundle: Bundle, way: BaseWay, matrices: Matrices, loaded: MixedModel, texts: Texts) -> Packing:
    """How a base is packed; calibrated with what the loaded bundle's layers are given in the texts.

    Raises:
        ModelError: no row is wide enough for groups.
    """
    (layers, kept), dtype = matrices, DTYPES[bundle.manifest.dtype]
    form = EIGHT_BITS if way.bits == EIGHT_BITS.bits else four_bits(layer.shape[1] for layer in layers.values())
    if not way.calibrated:
        return Packing(form, layers, kept, Nearest(form, dtype))
    inside = dict(loaded.hf.named_modules(remove_duplicate=False))
    read = reached(loaded, texts, [layer.module for layer in layers.values() if layer.module in inside])
    if way.bits < EIGHT_BITS.bits:
        fine = {name: x for name, x in layers.items() if x.module in read and form.takes(x.shape[1])}
        kept = sorted([*kept, *(x.module for name, x in layers.items() if name not in fine)])
        layers = fine
    if not layers:
        raise ModelError(f"{bundle.path}: no text comes to a linear layer whose rows have whole groups of {form.group}")
    stored = base_of(bundle.path, ()).tensors
    order = [layers[name] for name in stored if name in layers and layers[name].module in read]
    return Packing(form, layers, kept, Calibrated(form, dtype, loaded, texts, order))


def packable(bundle: Bundle, bits: int) -> Matrices:
    """The stored tensors that are one matrix, of a linear layer or of a block of experts that are run together, and the
    linear layers that stay as they are.

    Raises:
        ModelError: there is none, transformers does not know the architecture, or four bits would need a calibration of
            block experts.
    """
    model = meta_model(bundle.path)
    if model is None:
        raise ModelError(
            f"{bundle.path}: transformers does not know {bundle.manifest.architecture} without its own code"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = {name for name, module in modules.items() if type(module) is nn.Linear}
    layers = {
        layer.tensor: layer
        for layer in bundle.manifest.layers
        if layer.role == "linear" and (layer.module in linear or layer.module not in modules)
        if layer.parameter == "weight" and not (layer.slice or layer.transposed or layer.dtype)
    }
    if not layers:
        raise ModelError(f"{bundle.path}: no linear layer of {bundle.manifest.architecture} is stored as one matrix")
    together = [layer.tensor for layer in layers.values() if layer.module not in modules]
    if together and bits < EIGHT_BITS.bits:
        raise ModelError(
            f"{bundle.path}: {together[0]} is run together with others in one tensor, for which GPTQ has no "
            "calibration here; --base int8 packs it"
        )
    return layers, sorted(linear - {layer.module for layer in layers.values()})


def write_base(base: Checkpoint, folder: Path, packing: Packing, dtype: torch.dtype) -> dict[str, FileEntry]:
    entries: list[Entry] = []
    sources: list[str] = []
    for name, info in base.tensors.items():
        made = _entries(name, info.shape, packing.form, dtype) if name in packing.layers else [_as_it_is(base, name)]
        entries += made
        sources += [name] * len(made)
    parts: dict[str, Tensor] = {}

    def content(number: int) -> Iterator[bytes]:
        key, name = entries[number].key, sources[number]
        if name not in packing.layers:
            yield bytes(raw_bytes(base.read(name)))
            return
        if key not in parts:
            parts.clear()
            parts.update(packing.packed(name, base.read(name)))
        yield bytes(raw_bytes(parts[key]))

    return write_weights(folder, entries, content)


def _entries(name: str, shape: tuple[int, ...], form: Form, dtype: torch.dtype) -> list[Entry]:
    rows, columns = shape
    packed, scale = form.packed_shape(rows, columns), form.scale_shape(rows, columns)
    return [
        Entry(name + PACKED, "I32", packed, 4 * math.prod(packed)),
        Entry(name + SCALE, DTYPE_NAMES[dtype], scale, math.prod(scale) * dtype.itemsize),
        Entry(name + SHAPE, "I64", (2,), 16),
    ]


def _as_it_is(base: Checkpoint, name: str) -> Entry:
    info = base.tensors[name]
    size = info.dtype.itemsize if info.dtype else base.read(name).element_size()
    return Entry(name, info.stored_as, info.shape, info.numel * size)
