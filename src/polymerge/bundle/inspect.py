"""What a bundle holds and what the merge lost, as plain numbers: what `polymerge inspect` and the report show."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..recipe.rates import AnyRates
from .alignment import read_alignment
from .bundle import Bundle
from .peft import PEFT_PREFIX
from .stats import energy_kept, module_kind, relative_error
from .verdict import Verdict, verdict_of

WORST = 10


@dataclass(frozen=True)
class ExpertSummary:
    """One expert: where it came from and what it costs.

    Attributes:
        bytes: of its adapter and scales.
        residual_bytes: of these, the low-rank factors.
        own_tensors: how many whole tensors it has of its own (norms, embeddings, layers at rate 0).
        energy_kept: share of the squared residual norms that its factors keep, over all tensors.
        relative_error: sqrt of the summed squared errors over the summed squared norms, over all compressed tensors.
        lost_by_averaging: the same if nothing but the average (with the expert's scale) were kept.
        persona: what it has of its own beside its weights: tokenizer, template, generation, positions.
        aligned: how far its permuted tensors were from the first expert's (from the average, where it was added) before
            and after: ||W - W_1|| / ||W_1||; None where it was not aligned.
        verdict: whether it answers as before, predicted from the energy kept.
        shared: expert -> how many of this one's tensors lie in that one's file, as both have them in common.
    """

    name: str
    source: str
    bytes: int
    residual_bytes: int
    own_tensors: int
    scale_ratio_range: tuple[float, float]
    energy_kept: float
    relative_error: float
    lost_by_averaging: float
    verdict: Verdict
    persona: tuple[str, ...] = ()
    aligned: tuple[float, float] | None = None
    shared: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """A bundle in numbers. Sizes in bytes; shares in [0, 1].

    Attributes:
        coded: whether residuals are decoded when they are loaded, and take more in memory than on disk.
    """

    path: str
    architecture: str
    dtype: str
    compress_rate: AnyRates
    code: str
    coded: bool
    base_code: str
    scale: str
    layers_from: str
    base_bytes: int
    total_bytes: int
    separate_bytes: int
    share_of_one_model: float
    tensors: int
    storage: dict[str, int]
    rank_range: tuple[int, int]
    energy_kept: float
    energy_by_kind: dict[str, float]
    experts: tuple[ExpertSummary, ...]
    worst: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_bundle(bundle: Bundle | str | Path) -> Inspection:
    """Reads the manifest, the statistics and the adapters' headers; no tensor.

    Raises:
        BundleError: not a bundle, or incomplete.
    """
    bundle = Bundle.open(bundle)
    stats, sizes, manifest = bundle.stats(), bundle.sizes(), bundle.manifest
    ranks = [line["rank"] for line in stats if line["storage"] == "low_rank"]
    storage: dict[str, int] = defaultdict(int)
    # What one expert has nothing of is still stored as the others' is.
    weights = {layer.tensor for layer in manifest.layers if layer.role == "linear"}
    linear = (line for line in stats if line["tensor"] in weights)
    kinds = sorted(linear, key=lambda line: str(line["storage"]) != "average")
    for treatment in {line["tensor"]: line["storage"] for line in kinds}.values():
        storage[treatment] += 1
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in stats:
        by_kind[module_kind(line["module"])].append(line)
    return Inspection(
        path=str(bundle.path),
        architecture=manifest.architecture,
        dtype=manifest.dtype,
        compress_rate=manifest.method.compress_rate,
        code=manifest.method.code,
        coded=not manifest.code.peft_readable,
        base_code=manifest.base_code or manifest.dtype,
        scale=manifest.method.scale,
        layers_from=manifest.layers_from,
        base_bytes=sizes.base,
        total_bytes=sizes.total,
        separate_bytes=sizes.separate_models,
        share_of_one_model=sizes.total / sizes.one_model,
        tensors=len(manifest.layers),
        storage=dict(storage),
        rank_range=(min(ranks, default=0), max(ranks, default=0)),
        energy_kept=energy_kept(stats),
        energy_by_kind={kind: energy_kept(lines) for kind, lines in sorted(by_kind.items())},
        experts=tuple(_expert(bundle, name, [s for s in stats if s["expert"] == name]) for name in bundle.experts),
        worst=tuple(sorted(stats, key=lambda line: -line["relative_error"])[:WORST]),
        notes=manifest.notes,
    )


def alignments(bundle: Bundle) -> dict[str, tuple[float, float]]:
    """Expert -> how far it was from what it was aligned to, before and after; without the one that others fit."""
    alignments = {name: read_alignment(bundle.path, bundle.manifest, name) for name in bundle.experts}
    return {name: (a.before, a.after) for name, a in alignments.items() if a and a.before}


def _expert(bundle: Bundle, name: str, stats: list[dict[str, Any]]) -> ExpertSummary:
    residual = whole = 0
    with safe_open(bundle.expert_file(name), framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118
            part = handle.get_slice(key)
            if ".lora_" in key.removeprefix(PEFT_PREFIX):
                count = 1
                for size in part.get_shape():
                    count *= size
                residual += count * {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}[part.get_dtype()]
            else:
                whole += 1
    ratios = list(bundle.scales(name).values()) or [1.0]
    method = bundle.manifest.method
    tables = {layer.tensor for layer in bundle.manifest.layers if layer.role in ("embedding", "lm_head")}
    borrowed = [layer.borrowed[name] for layer in bundle.manifest.layers if name in layer.borrowed]
    return ExpertSummary(
        name=name,
        source=bundle.manifest.experts[name].source,
        bytes=bundle.sizes().experts[name],
        residual_bytes=residual,
        own_tensors=whole,
        scale_ratio_range=(min(ratios), max(ratios)),
        energy_kept=energy_kept(stats),
        relative_error=relative_error(stats),
        lost_by_averaging=relative_error(stats, "residual_norm"),
        verdict=verdict_of(stats, tables, code=bundle.code, rate=method.compress_rate),
        persona=bundle.manifest.experts[name].persona,
        aligned=alignments(bundle).get(name),
        shared=dict(Counter(lent.of for lent in borrowed if lent.of is not None)),
    )
