"""A bundle whose base is stored in 8 bits, as transformers and vLLM open it; everything else is the bundle's as it was.

Residuals stay as they are: fitted anew around the rounded base they spend their rank on noise (docs/log.md). What the
rounding costs is measured against the bundle, on prompts of every expert. One matrix is held at a time, and for the
measurement a loaded bundle.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle.bundle import Bundle, Sizes, base_of
from ..bundle.files import DTYPE_NAMES, Entry, FileEntry, raw_bytes, write_json
from ..bundle.manifest import MANIFEST, BundleLayer
from ..bundle.place import settled
from ..bundle.reading import steady
from ..bundle.write import write_manifest, write_weights
from ..errors import ModelError
from ..host import DTYPES, pick_device
from ..merging.upgrade import follow_router
from ..search.examples import LIMIT, Prompts, read_prompts
from ..sources.checkpoint import Checkpoint, read_json
from ..sources.layers import meta_model
from ..sources.packed import PACKED, SCALE, SHAPE, pack, quantisation_of, quantise_rows
from ..version import __version__
from .place import placed
from .vllm.calibrate import Calibration, check_tokenizer
from .vllm.prompts import CalibrationPrompt, builtin_prompts

BASE_CODES = ("int8",)


@dataclass(frozen=True)
class Cost:
    """What the rounded base does to one expert: KL in nats a token over the tokens of answers, and how often the
    likeliest token is the same."""

    kl: float
    same_token: float
    tokens: int


@dataclass(frozen=True)
class QuantisedBundle:
    """What was written, and what it costs."""

    bundle: Bundle
    before: Sizes
    after: Sizes
    costs: dict[str, Cost]

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle.path),
            "base": self.bundle.manifest.base_code,
            "before_bytes": self.before.total,
            "bytes": self.after.total,
            "share_of_one_model": self.after.total / self.after.one_model,
            "experts": {name: asdict(cost) for name, cost in self.costs.items()},
        }


def quantize_bundle(
    bundle: Bundle | str | Path,
    output: str | Path,
    *,
    base: str = "int8",
    prompts: Prompts | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> QuantisedBundle:
    """Writes a bundle anew with its base in fewer bits, and measures what that costs.

    Args:
        base: `int8`: every linear layer of the average rounded to the nearest of 256 levels a row; embeddings and
            heads, norms, biases and matrices that are stored with others in one tensor stay as they are.
        prompts: expert -> held-out requests, or their JSONL file, to measure on; an expert without has built-in ones,
            to which it writes the answers itself.
        limit: rows of each file.
        device: of the measurement.

    Raises:
        ModelError: another base, a base that is stored so already, or one without a linear layer of its own.
        BundleError, DataError, OutputExistsError, DiskSpaceError: before anything is written.
    """
    bundle, output = Bundle.open(bundle), settled(output)
    _check(bundle, base)
    for expert in prompts or ():
        bundle.expert_folder(expert)
    samples = _samples(bundle, read_prompts(prompts or {}, limit or LIMIT))
    check_tokenizer(bundle)
    layers, kept = packable(bundle)
    with placed(output, overwrite=False, needed=bundle.sizes().total) as staged, steady(bundle):
        made = _write(bundle, staged, layers, kept)
        costs = _costs(bundle, made, samples, device)
    after = Bundle.open(output)
    return QuantisedBundle(after, bundle.sizes(), after.sizes(), costs)


def _check(bundle: Bundle, base: str) -> None:
    if base not in BASE_CODES:
        raise ModelError(
            f"base {base!r} is not stored: there is {', '.join(BASE_CODES)}, which needs no calibration. Four bits "
            'need a calibrated quantiser, which polymerge does not have; `load_model(base="nf4")` rounds in memory'
        )
    if bundle.manifest.base_code is not None:
        raise ModelError(f"{bundle.path}: its base is stored in {bundle.manifest.base_code} already")


def packable(bundle: Bundle) -> tuple[dict[str, BundleLayer], list[str]]:
    """The stored tensors that are the weight of one linear layer, and the linear layers that stay as they are.

    Raises:
        ModelError: there is none, or transformers does not know the architecture.
    """
    model = meta_model(bundle.path)
    if model is None:
        raise ModelError(
            f"{bundle.path}: transformers does not know {bundle.manifest.architecture} without its own code"
        )
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    layers = {
        layer.tensor: layer
        for layer in bundle.manifest.layers
        if layer.role == "linear" and layer.module in linear and layer.parameter == "weight"
        if not (layer.slice or layer.transposed or layer.dtype)
    }
    if not layers:
        raise ModelError(f"{bundle.path}: no linear layer of {bundle.manifest.architecture} is stored as one matrix")
    return layers, sorted(linear - {layer.module for layer in layers.values()})


def _write(bundle: Bundle, folder: Path, layers: Mapping[str, BundleLayer], kept: Sequence[str]) -> Bundle:
    files: dict[str, FileEntry] = {}
    weights = {name for name in bundle.manifest.files if "/" not in name and ".safetensors" in name}
    for name, entry in bundle.manifest.files.items():
        if name not in weights and name != "config.json":
            _copy(bundle.path / name, folder / name)
            files[name] = entry
    for extra in _beside(bundle):
        _copy(bundle.path / extra, folder / extra)
    config = read_json(bundle.path / "config.json") | {"quantization_config": quantisation_of(kept)}
    files["config.json"] = write_json(folder / "config.json", config)
    files |= _write_base(base_of(bundle.path, ()), folder, layers, DTYPES[bundle.manifest.dtype])
    changed = {"base_code": "int8", "format_version": 7, "files": dict(sorted(files.items()))}
    manifest = bundle.manifest.model_copy(update=changed | {"polymerge_version": __version__})
    made = Bundle(folder, manifest.checked())
    follow_router(folder, bundle.digest, made.digest)
    write_manifest(folder, made.manifest.to_json())
    return made


def _beside(bundle: Bundle) -> Iterator[str]:
    """Files that the manifest does not list: the statistics, the router, and what was measured."""
    for file in sorted(path for path in bundle.path.rglob("*") if path.is_file()):
        name = str(file.relative_to(bundle.path))
        if name not in bundle.manifest.files and name != MANIFEST and not name.startswith("."):
            yield name


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_base(
    base: Checkpoint, folder: Path, layers: Mapping[str, BundleLayer], dtype: torch.dtype
) -> dict[str, FileEntry]:
    entries: list[Entry] = []
    sources: list[str] = []
    for name, info in base.tensors.items():
        made = _entries(name, info.shape, dtype) if name in layers else [_as_it_is(base, name)]
        entries += made
        sources += [name] * len(made)
    parts: dict[str, Tensor] = {}

    def content(number: int) -> Iterator[bytes]:
        key, name = entries[number].key, sources[number]
        if name not in layers:
            yield bytes(raw_bytes(base.read(name)))
            return
        if key not in parts:
            parts.clear()
            parts.update(_packed(name, base.read(name), dtype))
        yield bytes(raw_bytes(parts[key]))

    return write_weights(folder, entries, content)


def _entries(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Entry]:
    rows, columns = shape
    packed = (rows, -(-columns // 4))
    return [
        Entry(name + PACKED, "I32", packed, 4 * packed[0] * packed[1]),
        Entry(name + SCALE, DTYPE_NAMES[dtype], (rows, 1), rows * dtype.itemsize),
        Entry(name + SHAPE, "I64", (2,), 16),
    ]


def _as_it_is(base: Checkpoint, name: str) -> Entry:
    info = base.tensors[name]
    size = info.dtype.itemsize if info.dtype else base.read(name).element_size()
    return Entry(name, info.stored_as, info.shape, info.numel * size)


def _packed(name: str, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    numbers, scale = quantise_rows(weight, dtype)
    return {name + PACKED: pack(numbers), name + SCALE: scale, name + SHAPE: torch.tensor(weight.shape)}


def _samples(bundle: Bundle, prompts: Mapping[str, Any]) -> dict[str, list[CalibrationPrompt]]:
    given = {
        name: [CalibrationPrompt(example.prompt, example.answer or None) for example in examples]
        for name, examples in prompts.items()
    }
    return {expert: given.get(expert) or builtin_prompts() for expert in bundle.experts}


def _costs(
    before: Bundle, after: Bundle, samples: Mapping[str, Sequence[CalibrationPrompt]], device: str
) -> dict[str, Cost]:
    """Both loaded, one after the other; what the first says is kept meanwhile."""
    place = pick_device(device)
    exact = Calibration(before, samples, place)
    truths = {expert: list(exact.truths(expert)) for expert in before.experts}
    del exact
    gc.collect()  # a model whose forwards were taken refers to itself
    rounded = Calibration(
        after, samples, place, rows={e: [(ids, start) for ids, start, _ in t] for e, t in truths.items()}
    )
    return {expert: _cost(truths[expert], list(rounded.truths(expert))) for expert in before.experts}


def _cost(truths: Sequence[tuple[list[int], int, Tensor]], others: Sequence[tuple[list[int], int, Tensor]]) -> Cost:
    total, same, tokens = 0.0, 0, 0
    for (_, start, truth), (_, _, other) in zip(truths, others, strict=True):
        p, q = truth[max(start - 1, 0) :], other[max(start - 1, 0) :]
        total += float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return Cost(max(total, 0.0) / max(tokens, 1), same / max(tokens, 1), tokens)
