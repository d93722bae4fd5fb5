"""Is a bundle whole, and does it still say what its sources say?

Three looks: every file's hash, the structure of every adapter against the base, and, where the sources are at hand,
every expert rebuilt and compared with its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import Bundle
from ..bundle.manifest import BundleLayer
from ..bundle.peft import adapter_config, coded_config
from ..errors import BundleError, PolymergeError, SourceError
from ..sources.checkpoint import Checkpoint, Origin, read_json
from ..sources.layers import map_layers
from ..sources.opening import opened_again

# A rebuilt tensor may differ from what the merge measured by the rounding of the float32 products alone.
TOLERANCE = 1e-4
# Settings of an adapter that follow from its tensors.
CHECKED_SETTINGS = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
    "trainable_token_indices", "lora_bias", "fan_in_fan_out",
)  # fmt: skip


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
    """What `verify` found. `problems` is empty for a good bundle."""

    files: int
    problems: list[str] = field(default_factory=list)
    sources: list[SourceCheck] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    bundle: Bundle | str | Path,
    *,
    sources: bool = False,
    moved: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Checks hashes and structure, and with `sources` every expert against its checkpoint.

    Args:
        moved: expert -> source, where a checkpoint is no longer where the manifest says.
        progress: called with what is being looked at.

    Raises:
        BundleError: the bundle cannot even be opened. SourceError: a source cannot be.
    """
    bundle = Bundle.open(bundle)
    found = Verification(files=len(bundle.manifest.files))
    if progress:
        progress("hashes")
    found.problems += [f"{name}: {what}" for name, what in bundle.damaged_files()]
    if found.problems:  # the structure of damaged files says nothing new
        return found
    found.problems += _base_problems(bundle)
    for expert in bundle.experts:
        if progress:
            progress(f"structure of {expert}")
        found.problems += _adapter_problems(bundle, expert)
    if sources and not found.problems:
        for expert in bundle.experts:
            if progress:
                progress(f"{expert} against its source")
            check, problems = _against_source(bundle, expert, (moved or {}).get(expert))
            found.sources.append(check)
            found.problems += problems
    return found


def _base_problems(bundle: Bundle) -> Iterator[str]:
    stored = bundle.base.tensors
    for layer in bundle.layers.values():
        if layer.tensor not in stored:
            yield f"base: tensor {layer.tensor!r} of the manifest is missing"
        elif stored[layer.tensor].shape != layer.shape:
            found = list(stored[layer.tensor].shape)
            yield f"base: tensor {layer.tensor!r} is {found}, the manifest says {list(layer.shape)}"
    for tensor in stored:
        if tensor not in bundle.layers:
            yield f"base: tensor {tensor!r} is not in the manifest"


def _adapter_problems(bundle: Bundle, expert: str) -> Iterator[str]:
    try:
        adapter = bundle.adapter(expert)
    except BundleError as error:  # a code that cannot be decoded
        yield f"expert {expert!r}: {error}"
        return
    allowed: dict[str, tuple[int, ...] | None] = {}
    for layer in bundle.layers.values():
        allowed |= _allowed_keys(layer, adapter)
    for key, tensor in adapter.items():
        if key not in allowed:
            yield f"expert {expert!r}: {key!r} belongs to no tensor of the base"
        elif allowed[key] is not None and tuple(tensor.shape) != allowed[key]:
            yield f"expert {expert!r}: {key!r} is {list(tensor.shape)}, expected {list(allowed[key] or ())}"
        elif not bool(torch.isfinite(tensor.float()).all()):
            yield f"expert {expert!r}: {key!r} holds NaN or infinite values"
    for tensor_name, ratio in bundle.scales(expert).items():
        if tensor_name not in bundle.layers:
            yield f"expert {expert!r}: a scale for {tensor_name!r}, which is not in the base"
        elif not (math.isfinite(ratio) and ratio >= 0):
            yield f"expert {expert!r}: scale {ratio} of {tensor_name!r} is not a ratio"
    config = read_json(bundle.expert_folder(expert) / "adapter_config.json")
    expected = _expected_config(bundle, adapter)
    for key in CHECKED_SETTINGS:
        if config.get(key) != expected.get(key):
            yield f"expert {expert!r}: adapter_config.json's {key!r} does not fit the adapter's tensors"


def _expected_config(bundle: Bundle, adapter: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    manifest = bundle.manifest
    if manifest.method.code != "factors":
        return coded_config(manifest.method.code)
    shapes = [(key, tuple(tensor.shape)) for key, tensor in adapter.items()]
    return adapter_config(shapes, bundle.layers.values(), tied_embedding=manifest.tied_embedding)


def _allowed_keys(layer: BundleLayer, adapter: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...] | None]:
    keys: dict[str, tuple[int, ...] | None] = {f"{layer.module}.{layer.parameter}": layer.shape}
    if layer.role == "linear":
        rows, columns = layer.shape[::-1] if layer.transposed else layer.shape
        a = adapter.get(f"{layer.module}.lora_A.weight")
        rank = a.shape[0] if a is not None else layer.rank
        keys[f"{layer.module}.lora_A.weight"] = (rank, columns)
        keys[f"{layer.module}.lora_B.weight"] = (rows, rank)
        keys[f"{layer.module}.lora_B.bias"] = (rows,)
    return keys


def _against_source(bundle: Bundle, expert: str, moved: str | None) -> tuple[SourceCheck, list[str]]:
    record = bundle.manifest.experts[expert]
    source = moved or record.source
    try:
        revision = None if moved else record.revision
        checkpoint = opened_again(Origin(source, revision, record.base, record.base_revision))
    except PolymergeError as reason:
        raise SourceError(f"expert {expert!r}: {reason}; say where it is now with --source {expert}=PATH") from None
    recorded = {line["tensor"]: line["relative_error"] for line in bundle.stats() if line["expert"] == expert}
    names = _names_in(bundle, checkpoint)
    reader = bundle.expert_reader(expert)
    worst, where, exact, problems = 0.0, "", 0, []
    kept = {"embedding": bundle.manifest.method.embeddings, "lm_head": bundle.manifest.method.lm_head}
    for layer in bundle.layers.values():
        if layer.tensor not in names:
            problems.append(f"expert {expert!r}: {source} has no tensor for {layer.tensor!r}")
            continue
        original = checkpoint.read(names[layer.tensor]).double()
        rebuilt = reader.read(layer.tensor).double()
        norm = float(original.norm())
        error = float((original - rebuilt).norm()) / norm if norm else float(rebuilt.norm())
        exact += error == 0.0
        if error > worst:
            worst, where = error, layer.tensor
        if layer.role != "linear" and kept.get(layer.role, bundle.manifest.method.norms) == "average":
            continue
        allowed = recorded.get(layer.tensor, 0.0) + TOLERANCE + _rounding(bundle)
        if error > allowed:
            problems.append(
                f"expert {expert!r}: tensor {layer.tensor!r} is {error:.3g} from {source}, the merge measured "
                f"{recorded.get(layer.tensor, 0.0):.3g}; is it the checkpoint that was merged?"
            )
    return SourceCheck(expert, source, len(bundle.layers), exact, worst, where), problems


def _rounding(bundle: Bundle) -> float:
    return {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[bundle.manifest.dtype]


def _names_in(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor of the bundle -> tensor of this checkpoint."""
    layer_map = map_layers(checkpoint)
    by_place = {(record.module, record.parameter): record.tensor for record in layer_map.records.values()}
    names = {}
    for layer in bundle.layers.values():
        source = by_place.get((layer.module, layer.parameter))
        if layer.role == "lm_head" and layer_map.tied:
            source = layer_map.embedding
        if source:
            names[layer.tensor] = source
    return names
