"""One expert as an adapter for plain PEFT, and what dropping the ratios rho costs there, as a share of each tensor."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.adapter import adapter_of, adapter_shapes
from ..bundle.bundle import Bundle
from ..bundle.files import check_free_space, disk_errors, entry_of, raw_bytes, write_json, write_safetensors
from ..bundle.layer import BundleLayer
from ..bundle.manifest import ADAPTER_FILE
from ..bundle.peft import (
    FACTORED_TABLES,
    LISTED_BLOCKS,
    NAMESAKES,
    SLICED_BLOCKS,
    adapter_config,
    around_others,
    as_peft,
    missing_zeros,
    stored_name,
)
from ..bundle.personas import write_files
from ..bundle.place import settled
from ..bundle.reading import steady
from ..errors import ModelError
from ..sources.checkpoint import natural_key, read_json
from ..sources.layers import meta_model
from .place import placed


@dataclass(frozen=True)
class PeftExport:
    """A written adapter and what plain PEFT loses because it has no place for the ratios rho.

    Attributes:
        folder: the adapter.
        dropped_ratio_error: largest ||(rho - 1) W̄|| / ||W|| of any tensor; 0 with `scale: shared`.
        worst_tensor: where that is.
        compression_error: the largest relative error that the compression itself left, to compare it with.
    """

    folder: Path
    dropped_ratio_error: float
    worst_tensor: str | None
    compression_error: float


def export_peft(bundle: Bundle | str | Path, expert: str, output: str | Path, *, overwrite: bool = False) -> PeftExport:
    """Writes an expert's adapter for plain PEFT over the bundle's average, with its tokenizer, chat template and
    generation settings beside it, and measures what dropping rho costs.

    Factors that have a code are decoded, in the bundle's dtype, an expert's at once.
    """
    bundle, output = Bundle.open(bundle), settled(output)
    bundle.expert_folder(expert)
    if "positions" in bundle.manifest.experts[expert].persona:
        raise ModelError(
            f"expert {expert!r}: its positions are not the average's, over which PEFT would run it; "
            "export it with --to dense"
        )
    rows = bundle.vocabulary(expert)
    if rows is not None:
        raise ModelError(
            f"expert {expert!r}: its vocabulary has {rows} tokens, and the average, over which PEFT would run it, "
            f"{bundle.table_rows}, so that it could answer with others' tokens; export it with --to dense"
        )
    _check_tables(bundle, expert)
    with placed(output, bundle, overwrite=overwrite) as staged, steady(bundle):
        config = _write_adapter(bundle, expert, staged)
        if config["peft_type"] == SLICED_BLOCKS:
            fused = next(layer.slice.tensor for layer in bundle.layers.values() if layer.slice)
            raise ModelError(
                f"expert {expert!r}: PEFT has no place for the residuals of the matrices in {fused!r}; "
                "export with --to dense"
            )
        if config["peft_type"] == NAMESAKES:
            raise ModelError(
                f"expert {expert!r}: PEFT takes dense layers and shared experts for parts of the mixture's blocks, "
                "which are called alike, and would leave their residuals out; export with --to dense"
            )
        if config["peft_type"] == LISTED_BLOCKS:
            raise ModelError(
                f"expert {expert!r}: PEFT does not join the matrices of this architecture's mixture, and would leave "
                "their residuals out; export with --to dense"
            )
        around = around_others(config["modules_to_save"] or (), config["target_modules"])
        if around is not None:
            raise ModelError(
                f"expert {expert!r}: PEFT has no place for numbers of {around!r} itself beside those of the modules in "
                "it; export with --to dense"
            )
        if config["peft_type"] == FACTORED_TABLES:
            raise ModelError(
                f"expert {expert!r}: PEFT has no place for its own numbers beside the residual of an embedding or a "
                "head; export it with --to dense"
            )
        if config["peft_type"] != "LORA":
            raise ModelError(
                f"expert {expert!r}: PEFT has no place for the whole matrices of its mixture-of-experts blocks; "
                "merge at a compress rate over 0, or export with --to dense"
            )
        config["base_model_name_or_path"] = str(bundle.path.resolve())
        write_json(staged / "adapter_config.json", config)
        persona = bundle.persona(expert)
        if persona.files:
            write_files(staged, persona, ("tokenizer", "template"))
        if persona.generation:
            write_files(staged, persona, ("generation",))
        write_files(staged, persona, ("processor",))
        error, worst = _cost_of_dropping_ratios(bundle, expert)
        lost = max((s["relative_error"] for s in bundle.stats() if s["expert"] == expert), default=0.0)
    return PeftExport(output, error, worst, lost)


def _write_adapter(bundle: Bundle, expert: str, staged: Path) -> dict[str, Any]:
    """The adapter's weights as PEFT reads them. Returns its configuration."""
    file, tables = bundle.expert_file(expert), _factored_tables(bundle)
    borrows = any(expert in layer.borrowed for layer in bundle.manifest.layers)
    if bundle.code.peft_readable and not borrows and not any(layer.role == "embedding" for layer in tables):
        check_free_space(staged, file.stat().st_size)
        with disk_errors(staged):
            shutil.copyfile(file, staged / ADAPTER_FILE)
        return read_json(file.with_name("adapter_config.json"))
    tied, adapter = bundle.manifest.tied_embedding, adapter_of(bundle, expert)
    layers = _with_whole_embeddings(bundle, expert, adapter)
    factored = any(layer.rank and layer.role != "linear" for layer in layers)
    tensors = as_peft(adapter, layers, tied=(tied, _head_of(bundle)) if tied and factored else None)
    entries = [entry_of(key, tensor) for key, tensor in tensors.items()]
    entries += missing_zeros({entry.key: entry.shape for entry in entries}, layers)
    entries.sort(key=lambda entry: natural_key(entry.key))
    check_free_space(staged, sum(entry.bytes for entry in entries))
    contents = (bytes(raw_bytes(tensors[e.key])) if e.key in tensors else bytes(e.bytes) for e in entries)
    shapes, kind = [(entry.key, entry.shape) for entry in entries], bundle.base.config.get("model_type")
    config = adapter_config(shapes, layers, tied_embedding=tied, model_type=kind)
    by_rows = set(config["trainable_token_indices"] or ())
    named = [entry._replace(key=stored_name(entry.key, by_rows)) for entry in entries]
    write_safetensors(staged / ADAPTER_FILE, named, contents)
    return config


def _with_whole_embeddings(bundle: Bundle, expert: str, adapter: dict[str, Tensor]) -> list[BundleLayer]:
    """The layers as PEFT can hold them: it takes no biases beside the factors of an embedding, so that one of an expert
    that has biases is written whole, into `adapter`."""
    layers = list(bundle.layers.values())
    if not any(key.endswith(".lora_B.bias") for key in adapter):
        return layers
    for number, layer in enumerate(layers):
        if layer.role == "embedding" and layer.rank:
            for factor in "AB":
                adapter.pop(f"{layer.module}.lora_{factor}.weight", None)
            adapter[f"{layer.module}.{layer.parameter}"] = bundle.reconstruct(expert, layer.tensor)
            layers[number] = layer.model_copy(update={"rank": 0, "ranks": {}, "borrowed": {}, "numbers": ()})
    return layers


def _factored_tables(bundle: Bundle) -> list[BundleLayer]:
    return [layer for layer in bundle.layers.values() if layer.rank and layer.role != "linear"]


def _check_tables(bundle: Bundle, expert: str) -> None:
    """Raises ModelError for what PEFT has no place for beside the residuals of an embedding or a head."""
    tables = _factored_tables(bundle)
    stored = adapter_shapes(bundle, expert)
    rows = next((x.tensor for x in tables if f"{x.module}.{x.parameter}" in stored), None)
    if rows is not None:
        raise ModelError(
            f"expert {expert!r}: PEFT has no place for rows of its own beside the residual of {rows!r}; "
            "export it with --to dense"
        )


def _head_of(bundle: Bundle) -> str:
    """The module of the output head."""
    model: Any = meta_model(bundle.path)
    head = model.get_output_embeddings() if model is not None else None
    names: list[str] = [name for name, module in model.named_modules() if module is head] if head is not None else []
    if not names:
        raise ModelError(
            f"{bundle.path}: transformers does not know its output head, to which PEFT wants the residual of the "
            "embedding too; export with --to dense"
        )
    return names[0]


def _cost_of_dropping_ratios(bundle: Bundle, expert: str) -> tuple[float, str | None]:
    worst, where = 0.0, None
    reader = bundle.expert_reader(expert)
    for tensor, ratio in bundle.scales(expert).items():
        if ratio == 1.0:
            continue
        base = float(torch.linalg.vector_norm(bundle.base_tensor(tensor).double()))
        weight = float(torch.linalg.vector_norm(reader.read(tensor).double()))
        error = abs(ratio - 1.0) * base / weight
        if error > worst:
            worst, where = error, tensor
    return worst, where
