"""Take one expert out of a bundle: as a dense checkpoint, or as an adapter for plain PEFT.

Streams: one tensor in memory at a time, but for factors that have a code: PEFT gets these decoded, an expert's at once.
What an export cannot express is measured and returned.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import assemble
from .bundle import ADAPTER_FILE, Bundle
from .checkpoint import read_json
from .errors import ModelError, OutputExistsError
from .plan import DTYPES
from .staging import (
    DTYPE_NAMES,
    Entry,
    Piece,
    check_free_space,
    disk_errors,
    raw_bytes,
    write_bytes,
    write_json,
    write_safetensors,
)


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


def export_dense(
    bundle: Bundle | str | Path, expert: str, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Writes an expert as an ordinary checkpoint that transformers (and llama.cpp's converter) opens.

    Args:
        dtype: "float32", "bfloat16" or "float16"; by default the bundle's.

    Raises:
        BundleError: unknown expert. OutputExistsError, DiskSpaceError: before anything is written.
    """
    bundle, output = Bundle.open(bundle), Path(output).expanduser()
    bundle.expert_folder(expert)
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    target = DTYPES[dtype or bundle.manifest.dtype]
    entries = [_entry(bundle, tensor, target) for tensor in bundle.layers]
    check_free_space(output.parent, sum(entry[3] for entry in entries))
    staged = _fresh(output, overwrite=overwrite)
    tied = bool(read_json(bundle.path / "config.json").get("tie_word_embeddings"))
    config = assemble.bundle_config(
        read_json(bundle.path / "config.json"), dtype=dtype or bundle.manifest.dtype, tied=tied, code=True
    )
    assemble.copy_model_files(bundle.path, staged, config, code=True)
    reader = bundle.expert_reader(expert)

    def content(index: int) -> Iterator[bytes]:
        tensor = reader.read(entries[index][0])
        tensor = tensor.to(target) if tensor.is_floating_point() else tensor
        yield bytes(raw_bytes(tensor))

    assemble.write_weights(staged, entries, content)
    return _publish(staged, output)


def export_peft(bundle: Bundle | str | Path, expert: str, output: str | Path, *, overwrite: bool = False) -> PeftExport:
    """Writes an expert's adapter for plain PEFT over the bundle's average, and measures what dropping rho costs."""
    bundle, output = Bundle.open(bundle), Path(output).expanduser()
    bundle.expert_folder(expert)
    staged = _fresh(output, overwrite=overwrite)
    config = _write_adapter(bundle, expert, staged)
    if config["peft_type"] != "LORA":
        shutil.rmtree(staged)
        raise ModelError(
            f"expert {expert!r}: PEFT has no place for the whole matrices of its mixture-of-experts blocks; "
            "merge at a compress rate over 0, or export with --to dense"
        )
    config["base_model_name_or_path"] = str(bundle.path.resolve())
    write_json(staged / "adapter_config.json", config)
    for file in sorted(bundle.path.glob("token*.json")):
        write_bytes(staged / file.name, file.read_bytes())
    error, worst = _cost_of_dropping_ratios(bundle, expert)
    lost = max((s["relative_error"] for s in bundle.stats() if s["expert"] == expert), default=0.0)
    return PeftExport(_publish(staged, output), error, worst, lost)


def _write_adapter(bundle: Bundle, expert: str, staged: Path) -> dict[str, Any]:
    """The adapter's weights as PEFT reads them. Returns its configuration."""
    file = bundle.expert_file(expert)
    if bundle.code.name == "factors":
        check_free_space(staged, file.stat().st_size)
        with disk_errors(staged):
            shutil.copyfile(file, staged / ADAPTER_FILE)
        return read_json(file.with_name("adapter_config.json"))
    tensors = bundle.adapter(expert)
    pieces = [
        Piece(expert, key, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, file=key)
        for key, tensor in tensors.items()
    ]
    layers, tied = list(bundle.layers.values()), bundle.manifest.tied_embedding
    config, pieces = assemble.peft_adapter(expert, pieces, layers, tied_embedding=tied)
    check_free_space(staged, sum(piece.bytes for piece in pieces))
    entries = [(piece.key, piece.dtype, piece.shape, piece.bytes) for piece in pieces]
    contents = (bytes(raw_bytes(tensors[p.file])) if p.file else bytes(p.bytes) for p in pieces)
    write_safetensors(staged / ADAPTER_FILE, entries, contents)
    return config


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


def _entry(bundle: Bundle, tensor: str, dtype: torch.dtype) -> Entry:
    info = bundle.base.tensors[tensor]
    if info.dtype is None:  # integers and the like keep their own type
        width = bundle.base_tensor(tensor).element_size()
        return tensor, info.stored_as, info.shape, info.numel * width
    return tensor, DTYPE_NAMES[dtype], info.shape, info.numel * dtype.itemsize


def _fresh(output: Path, *, overwrite: bool) -> Path:
    """An empty folder beside the output, to be renamed to it when whole."""
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output}: exists; give --overwrite to replace it, or another --output")
    if output.exists() and not (output.is_dir() and _is_export(output)):
        raise OutputExistsError(f"{output}: exists and is not an exported model; it is never overwritten")
    staged = output.with_name(output.name + ".partial")
    assemble.clear(staged)
    return staged


def _is_export(folder: Path) -> bool:
    known = ("config.json", "adapter_config.json")
    return not any(folder.iterdir()) or any((folder / name).exists() for name in known)


def _publish(staged: Path, output: Path) -> Path:
    if output.exists():
        shutil.rmtree(output)
    staged.rename(output)
    return output
