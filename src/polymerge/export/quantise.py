"""A bundle whose base is stored in 8 or 4 bits, as transformers and vLLM open it; everything else is as it was.

Residuals stay as they are: fitted anew around the rounded base they spend their rank on noise (docs/log.md). What the
rounding costs is measured against the bundle, on prompts of every expert. One matrix is held at a time, beside a loaded
bundle. Who rounds is `polymerge.export.rounding`.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.base import base_of
from ..bundle.bundle import Bundle
from ..bundle.files import FileEntry, write_json
from ..bundle.manifest import MANIFEST
from ..bundle.place import settled
from ..bundle.reading import steady
from ..bundle.sizes import Sizes
from ..bundle.write import write_manifest
from ..errors import DataError, ModelError, OutputExistsError
from ..host import DTYPES, pick_device
from ..merging.upgrade import follow_router
from ..search.examples import Prompts, read_prompts
from ..sources.checkpoint import read_json
from ..version import __version__
from .packing import BASE_WAYS, BaseWay, Matrices, Packing, packable, packing_of, write_base
from .place import placed
from .vllm.calibrate import Calibration, check_tokenizer
from .vllm.prompts import CalibrationPrompt, builtin_prompts


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
        base: `int8`: every linear layer of the average rounded to the nearest of 256 levels a row. `gptq-int8`: the
            same levels, chosen by GPTQ for what the layers are given. `gptq-int4`: 16 levels a group of 128, 64 or
            32 numbers, as the widths allow. Embeddings and heads, norms, biases and matrices that are stored with
            others in one tensor stay as they are; with 4 bits also layers that no text comes to. Matrices that are run
            with others in one tensor (block experts) have 8 bits to the nearest, and no four.
        prompts: expert -> requests, or their JSONL file, to measure on; an expert without has built-in ones, to which
            it writes the answers itself. GPTQ is calibrated with every second one, which is not measured then.
        limit: rows of each file.
        device: of the measurement.

    Raises:
        ModelError: another base, a base that is stored so already, one without a linear layer of its own, or inputs of
            a layer that are not finite.
        DataError: one request of an expert alone where some shall calibrate.
        BundleError, OutputExistsError, DiskSpaceError: before anything is written.
    """
    bundle, output = Bundle.open(bundle), settled(output)
    if output.exists():
        raise OutputExistsError(f"{output}: exists; give another --output")
    way = _checked(bundle, base)
    for expert in prompts or ():
        bundle.expert_folder(expert)
    samples = _samples(
        bundle, read_prompts({} if prompts is None else prompts, limit), fewest=2 if way.calibrated else 1
    )
    check_tokenizer(bundle)
    matrices = packable(bundle, way.bits)
    with placed(output, bundle, overwrite=False, needed=bundle.sizes().total) as staged, steady(bundle):
        costs = _written(bundle, staged, way, matrices, samples, pick_device(device))
    after = Bundle.open(output)
    return QuantisedBundle(after, bundle.sizes(), after.sizes(), costs)


def _checked(bundle: Bundle, base: str) -> BaseWay:
    if base not in BASE_WAYS:
        raise ModelError(
            f"base {base!r} is not stored: there is {', '.join(BASE_WAYS)}. Four bits that are not calibrated ruin a "
            'small model; `load_model(base="nf4")` rounds to them in memory'
        )
    if bundle.manifest.base_code is not None:
        raise ModelError(f"{bundle.path}: its base is stored in {bundle.manifest.base_code} already")
    return BASE_WAYS[base]


def _written(
    bundle: Bundle,
    folder: Path,
    way: BaseWay,
    matrices: Matrices,
    samples: Mapping[str, Sequence[CalibrationPrompt]],
    device: torch.device,
) -> dict[str, Cost]:
    """Both are loaded, one after the other; what the first says is kept meanwhile."""
    exact = Calibration(bundle, samples, device)
    rows = {expert: exact.rows(expert) for expert in bundle.experts}
    measured = {expert: of_expert[:: 2 if way.calibrated else 1] for expert, of_expert in rows.items()}
    truths = {expert: list(exact.truths(expert, of_expert)) for expert, of_expert in measured.items()}
    texts = {expert: [ids for ids, _ in of_expert[1::2]] for expert, of_expert in rows.items()}
    packing = packing_of(bundle, way, matrices, exact.model, texts)
    made = _write(bundle, folder, packing)
    del exact, packing
    gc.collect()  # a model whose forwards were taken refers to itself
    rounded = Calibration(made, samples, device, rows=measured)
    return {expert: _cost(truths[expert], list(rounded.truths(expert))) for expert in bundle.experts}


def _write(bundle: Bundle, folder: Path, packing: Packing) -> Bundle:
    files: dict[str, FileEntry] = {}
    weights = {name for name in bundle.manifest.files if "/" not in name and ".safetensors" in name}
    for name, entry in bundle.manifest.files.items():
        if name not in weights and name != "config.json":
            _copy(bundle.path / name, folder / name)
            files[name] = entry
    for extra in _beside(bundle):
        _copy(bundle.path / extra, folder / extra)
    config = read_json(bundle.path / "config.json") | {"quantization_config": packing.form.settings(packing.kept)}
    files["config.json"] = write_json(folder / "config.json", config)
    files |= write_base(base_of(bundle.path, ()), folder, packing, DTYPES[bundle.manifest.dtype])
    changed = {"base_code": packing.form.code, "format_version": 7, "files": dict(sorted(files.items()))}
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


def _samples(bundle: Bundle, prompts: Mapping[str, Any], fewest: int) -> dict[str, list[CalibrationPrompt]]:
    given = {
        name: [CalibrationPrompt(example.prompt, example.answer or None) for example in examples]
        for name, examples in prompts.items()
    }
    for name, examples in given.items():
        if len(examples) < fewest:
            raise DataError(f"prompts of {name!r}: {len(examples)} read; one calibrates and one measures (see --limit)")
    return {expert: given.get(expert) or builtin_prompts() for expert in bundle.experts}


def _cost(truths: Sequence[tuple[list[int], int, Tensor]], others: Sequence[tuple[list[int], int, Tensor]]) -> Cost:
    total, same, tokens = 0.0, 0, 0
    for (_, _, p), (_, _, q) in zip(truths, others, strict=True):
        total += float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return Cost(max(total, 0.0) / max(tokens, 1), same / max(tokens, 1), tokens)
