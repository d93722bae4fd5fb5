"""Is a bundle whole? Every file's hash, and the structure of base, adapters and manifest.

Knows the format alone; whether the experts are still what their checkpoints say is `polymerge.merging.sources`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleError, SourceError
from ..host import DTYPES
from ..sources.checkpoint import read_json
from ..sources.fused import by_matrices
from .adapter import adapter_of, adapter_shapes
from .alignment import alignment_problems
from .base import base_of
from .bundle import Bundle
from .files import slabs
from .layer import BundleLayer
from .manifest import MANIFEST
from .named import ROUTER, has_content
from .peft import adapter_config, borrowed_config, coded_config
from .personas import persona_problems
from .sealed import router_seal_holds, seal_holds
from .unlisted import unlisted_files

# Of a number that is written with all its digits: fewer are another reader's rounding.
LENT_DIGITS = 1e-6
# Settings of an adapter that follow from its tensors.
CHECKED_SETTINGS = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
    "trainable_token_indices", "lora_bias", "fan_in_fan_out",
)  # fmt: skip
# Kinds of files that router.json names.
ROUTER_FILES = ("weights", "samples", "held")


@dataclass(frozen=True)
class SourceCheck:
    """One expert against its checkpoint.

    Attributes:
        tensors: how many were compared.
        exact: how many came back to the bit.
        worst_error: largest relative error ||W - W'|| / ||W||, and the tensor where it is.
    """

    expert: str
    source: str
    tensors: int
    exact: int
    worst_error: float
    worst_tensor: str


@dataclass
class Verification:
    """What `verify` found. `problems` is empty for a good bundle.

    Attributes:
        sealed: whether the manifest has a digest of itself; of one without, what no file repeats was not checked.
    """

    files: int
    sealed: bool = True
    problems: list[str] = field(default_factory=list)
    sources: list[SourceCheck] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_files(bundle: Bundle, progress: Callable[[str], None] | None = None) -> Verification:
    """Checks hashes, looks for files that are not the bundle's, and where all is right checks the structure.

    Args:
        progress: called with what is being looked at.
    """
    say = progress or (lambda what: None)
    holds = seal_holds(bundle.path / MANIFEST)
    result = Verification(files=len(bundle.manifest.files), sealed=holds is not None)
    say("hashes")
    result.problems += [f"{name}: {what}" for name, what in bundle.damaged_files()]
    result.problems += [
        f"{name}: is not in the manifest, so not this bundle's; delete it"
        for name in unlisted_files(bundle.path, bundle.manifest)
    ]
    if result.problems:  # the structure of damaged files says nothing new
        return result
    result.problems += base_problems(bundle)
    if not result.problems:
        result.problems += architecture_problems(bundle)
    result.problems += alignment_problems(bundle.path, bundle.manifest)
    for expert in bundle.experts:
        say(f"structure of {expert}")
        result.problems += adapter_problems(bundle, expert)
        groups = bundle.manifest.experts[expert].persona
        result.problems += persona_problems(bundle.path, expert, groups, list(bundle.manifest.files))
    result.problems += router_problems(bundle.path)
    if holds is False and not result.problems:  # a change that was found says where it is
        result.problems.append(f"{MANIFEST}: was changed by hand or damaged: it has another digest than it says")
    return result


def router_problems(folder: Path) -> Iterator[str]:
    """Where the router's record, which no manifest lists, is not what its digest says, or files that it names are not
    what their names say."""
    record = folder / ROUTER
    if not record.is_file():
        return
    try:
        said = read_json(record)
    except SourceError as error:
        yield f"router/{record.name}: {error}; run `polymerge router fit` again"
        return
    if not router_seal_holds(said):
        yield f"router/{record.name}: was changed by hand or damaged; run `polymerge router fit` again"
    for name in (str(said[kind]) for kind in ROUTER_FILES if said.get(kind)):
        file = record.parent / name
        if not file.is_file():
            yield f"router/{name}: is missing; run `polymerge router fit` again"
        elif not has_content(name, file.read_bytes()):
            yield f"router/{name}: its content is not what its name says; run `polymerge router fit` again"


def base_problems(bundle: Bundle) -> Iterator[str]:
    """Where the average's tensors are not the manifest's."""
    stored, packed = bundle.base.tensors, bundle.packed()
    stored_code = packed.form.code if packed else None
    if stored_code != bundle.manifest.base_code:
        said, other = (x or bundle.manifest.dtype for x in (stored_code, bundle.manifest.base_code))
        yield f"base: its config.json says {said}, the manifest {other}"
    for layer in bundle.layers.values():
        if layer.tensor not in stored:
            yield f"base: tensor {layer.tensor!r} of the manifest is missing"
        elif stored[layer.tensor].shape != layer.shape:
            shape = list(stored[layer.tensor].shape)
            yield f"base: tensor {layer.tensor!r} is {shape}, the manifest says {list(layer.shape)}"
        elif layer.dtype and stored[layer.tensor].dtype != DTYPES[layer.dtype]:
            yield f"base: tensor {layer.tensor!r} is {stored[layer.tensor].stored_as}, the manifest says {layer.dtype}"
        elif not _finite(bundle, layer):
            yield f"base: tensor {layer.tensor!r} holds NaN or infinite values"
    for tensor in stored:
        if tensor not in bundle.layers:
            yield f"base: tensor {tensor!r} is not in the manifest"


def architecture_problems(bundle: Bundle) -> Iterator[str]:
    """Where the manifest's tensors are not those that transformers' model of the bundle's config.json has."""
    manifest = bundle.manifest
    try:
        _, layer_map = by_matrices(base_of(bundle.path, ()), whole=bundle.layers)
    except SourceError as error:
        yield f"base: {error}"
        return
    if layer_map.layers_from != manifest.layers_from:  # code of its own, or another transformers
        return
    for layer in manifest.layers:
        record = layer_map.records.get(layer.tensor)
        if record is None:
            yield f"base: tensor {layer.tensor!r} is no matrix of a mixture of experts"
            continue
        said = (layer.module, layer.parameter, layer.role, layer.transposed)
        if record.known and said != (record.module, record.parameter, record.role, record.transposed):
            yield (
                f"base: tensor {layer.tensor!r} is a {record.role} of {record.module!r}"
                f"{' [in, out]' * record.transposed}, the manifest says a {layer.role} of {layer.module!r}"
                f"{' [in, out]' * layer.transposed}"
            )
    if layer_map.tied and not manifest.tied_embedding:
        yield "base: its head is its embedding by config.json, but not by the manifest"
    elif manifest.tied_embedding and not layer_map.tied:
        yield "base: its head is its embedding by the manifest, but not by config.json"


def adapter_problems(bundle: Bundle, expert: str) -> Iterator[str]:
    """Where an expert's tensors, ratios or settings do not fit the base or each other."""
    try:
        adapter = adapter_of(bundle, expert)
    except BundleError as error:  # a code that cannot be decoded
        yield f"expert {expert!r}: {error}"
        return
    allowed: dict[str, tuple[int, ...] | None] = {}
    for layer in bundle.layers.values():
        allowed |= _allowed_keys(layer, adapter, len(bundle.manifest.experts[expert].own_rows))
    for key, tensor in adapter.items():
        if key not in allowed:
            yield f"expert {expert!r}: {key!r} belongs to no tensor of the base"
        elif allowed[key] is not None and tuple(tensor.shape) != allowed[key]:
            yield f"expert {expert!r}: {key!r} is {list(tensor.shape)}, expected {list(allowed[key] or ())}"
        elif not all_finite(tensor):
            yield f"expert {expert!r}: {key!r} holds NaN or infinite values"
    for layer in (layer for layer in bundle.layers.values() if layer.role == "linear" or layer.rank):
        factor, rank = adapter.get(f"{layer.module}.lora_B.weight"), layer.rank_of(expert)
        if factor is not None and factor.any() and factor.shape[-1] != rank:
            yield f"expert {expert!r}: rank {factor.shape[-1]} of {layer.tensor!r}, the manifest says {rank}"
        if factor is None and expert in layer.ranks:
            yield f"expert {expert!r}: no residual in {layer.tensor!r}, the manifest says one of rank {rank}"
    for tensor_name, ratio in bundle.scales(expert).items():
        if tensor_name not in bundle.layers:
            yield f"expert {expert!r}: a scale for {tensor_name!r}, which is not in the base"
        elif not (math.isfinite(ratio) and ratio >= 0):
            yield f"expert {expert!r}: scale {ratio} of {tensor_name!r} is not a ratio"
    yield from lent_problems(bundle, expert)
    config = read_json(bundle.expert_folder(expert) / "adapter_config.json")
    expected = expected_config(bundle, expert)
    for key in CHECKED_SETTINGS:
        if config.get(key) != expected.get(key):
            yield f"expert {expert!r}: adapter_config.json's {key!r} does not fit the adapter's tensors"


def lent_problems(bundle: Bundle, expert: str) -> Iterator[str]:
    """Where an expert has another's factors otherwise than a merge lends them: as they are, or, of two experts, turned
    round and by their ratios. No file but the manifest says how often."""
    own = bundle.scales(expert)
    ratios = {lender: bundle.scales(lender) for lender in bundle.experts}
    for layer in bundle.manifest.layers:
        lent = layer.borrowed.get(expert)
        if lent is None or lent.of is None:
            continue
        ratio, theirs = own.get(layer.tensor, 1.0), ratios[lent.of].get(layer.tensor, 1.0)
        turned = -ratio / theirs if theirs else 0.0
        if not any(math.isclose(lent.times, times, rel_tol=LENT_DIGITS) for times in (1.0, turned)):
            yield (
                f"expert {expert!r}: has {lent.times} times the residual of {lent.of!r} in {layer.tensor!r}, "
                f"of which the ratios of both make {turned}"
            )


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; whole numbers are finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _finite(bundle: Bundle, layer: BundleLayer) -> bool:
    if not layer.shape:
        return all_finite(bundle.base_tensor(layer.tensor))
    return all(all_finite(bundle.base.read_rows(layer.tensor, *rows)) for rows in slabs(layer.shape))


def expected_config(bundle: Bundle, expert: str) -> dict[str, Any]:
    """adapter_config.json as it follows from an expert's tensors."""
    manifest = bundle.manifest
    if not bundle.code.peft_readable:
        return coded_config(bundle.code)
    if any(expert in layer.borrowed for layer in manifest.layers):
        return borrowed_config()
    shapes, rows = adapter_shapes(bundle, expert).items(), manifest.experts[expert].own_rows
    tied, kept = manifest.tied_embedding, bundle.expert_reader(expert).kept_numbers()
    kind = bundle.base.config.get("model_type")
    return adapter_config(shapes, bundle.layers.values(), tied_embedding=tied, rows=rows, kept=kept, model_type=kind)


def _allowed_keys(
    layer: BundleLayer, adapter: Mapping[str, torch.Tensor], own_rows: int
) -> dict[str, tuple[int, ...] | None]:
    own = f"{layer.module}.{layer.parameter}"
    keys: dict[str, tuple[int, ...] | None] = {own: layer.shape}
    if layer.rank and layer.role != "linear":  # beside residuals an expert has its own rows at most
        keys = {own: (own_rows, *layer.shape[1:])} if layer.table and own_rows else {}
    if layer.role == "linear" or layer.rank:
        rows, columns = layer.shape[::-1] if layer.transposed else layer.shape
        a = adapter.get(f"{layer.module}.lora_A.weight")
        rank = a.shape[0] if a is not None else layer.rank
        keys[f"{layer.module}.lora_A.weight"] = (rank, columns)
        keys[f"{layer.module}.lora_B.weight"] = (rows, rank)
        keys[f"{layer.module}.lora_B.bias"] = (rows,)
    return keys
