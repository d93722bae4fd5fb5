"""An expert's adapter under the model's names, whatever its code and whoever lends it tensors: values, or shapes."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from ..host import DTYPES
from .expert import ExpertReader
from .folder import BundleFolder
from .kept import ROW_NUMBERS
from .layer import BundleLayer
from .peft import adapter_name
from .residuals import factors_of, popped
from .tensors import opened


def adapter_of(
    bundle: BundleFolder,
    expert: str,
    *,
    coded: Container[str] = (),
    apart: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """All tensors of an expert's adapter, keys without PEFT's prefix. Tables come whole, but for those with
    residuals, beside which are the rows that the expert has of its own; so do those that are another expert's too.

    Coded factors come decoded, as `lora_A.weight` and `lora_B.weight`.

    Args:
        coded: modules whose factors come as they are stored.
        apart: factors that are another expert's too are left out, and inherited ones come as they are stored, for
            whoever counts them as the manifest says.
        dtype: of decoded factors; by default the bundle's. 16 bits round what four bits and a scale say.
    """
    dtype = dtype or DTYPES[bundle.manifest.dtype]
    with opened(bundle.expert_file(expert)) as handle:
        tensors = {adapter_name(key): handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    reader = ExpertReader(bundle, expert)
    for layer in _kept(bundle, expert):
        tensors.pop(f"{layer.module}.{layer.parameter}{ROW_NUMBERS}", None)
        tensors[f"{layer.module}.{layer.parameter}"] = reader.kept(layer)
    tensors |= _borrowed(bundle, reader, expert, apart=apart, dtype=dtype)
    for layer in (layer for layer in bundle.manifest.layers if layer.table):
        key = f"{layer.module}.{layer.parameter}"
        if key in tensors and not layer.rank:
            tensors[key] = reader.whole_table(layer, tensors[key])
    if bundle.code.peft_readable:
        return tensors
    for layer in _factored(bundle):
        if layer.module in coded or (expert in layer.borrowed and layer.rank_of(expert)):
            continue
        factors = factors_of(bundle, expert, layer, popped(tensors))
        if factors:
            b, a = factors
            tensors |= {f"{layer.module}.lora_A.weight": a.to(dtype), f"{layer.module}.lora_B.weight": b.to(dtype)}
    return tensors


def _borrowed(
    bundle: BundleFolder, reader: ExpertReader, expert: str, *, apart: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    factored = (x for x in _factored(bundle) if expert in x.borrowed and x.rank_of(expert))
    tensors = {}
    for layer in (x for x in factored if not (apart and x.borrowed[expert].of is not None)):
        (b, a), times = reader.lent(layer.tensor)
        tensors[f"{layer.module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{layer.module}.lora_B.weight"] = (b if apart else b * times).to(dtype)
    return tensors


def adapter_shapes(bundle: BundleFolder, expert: str) -> dict[str, tuple[int, ...]]:
    """Shapes of what `adapter_of` gives, from the file's header alone; of a table of which a few rows are stored,
    theirs."""
    with opened(bundle.expert_file(expert)) as handle:
        shapes = {adapter_name(key): tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    for layer in _kept(bundle, expert):
        shapes.pop(f"{layer.module}.{layer.parameter}{ROW_NUMBERS}", None)
        rows = layer.rows.get(expert, layer.shape[0] if layer.shape else 0)
        shapes[f"{layer.module}.{layer.parameter}"] = (rows, *layer.shape[1:]) if layer.shape else ()
    for layer in (layer for layer in _factored(bundle) if expert in layer.borrowed and layer.rank_of(expert)):
        (out_features, in_features), rank = layer.matrix_shape, layer.rank_of(expert)
        shapes[f"{layer.module}.lora_A.weight"] = (rank, in_features)
        shapes[f"{layer.module}.lora_B.weight"] = (out_features, rank)
    if bundle.code.peft_readable:
        return shapes
    for layer in _factored(bundle):
        stored = [shapes.pop(f"{layer.module}.{suffix}", None) for suffix in bundle.code_of(expert, layer).suffixes]
        if stored[0]:
            out_features, in_features = layer.matrix_shape
            shapes[f"{layer.module}.lora_A.weight"] = (stored[0][0], in_features)
            shapes[f"{layer.module}.lora_B.weight"] = (out_features, stored[0][0])
    return shapes


def _kept(bundle: BundleFolder, expert: str) -> list[BundleLayer]:
    """What is stored of an expert's own in few rows, or in another's file."""
    return [x for x in bundle.manifest.layers if expert in x.rows or x.lends_whole(expert)]


def _factored(bundle: BundleFolder) -> list[BundleLayer]:
    return [layer for layer in bundle.manifest.layers if layer.role == "linear" or layer.rank]
