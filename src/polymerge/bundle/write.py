"""Puts finished pieces together: the base's shards, every expert's PEFT adapter, scales, statistics and the manifest.

A pure function of the pieces: run twice, it writes the same bytes (the statistics carry seconds, so they are not
in the manifest's list of files). Knows PEFT's adapter format; does not know how a piece was computed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..method.code import Code
from ..sources.checkpoint import SAFETENSORS_INDEX, natural_key
from ..sources.persona import GENERATION, MORE_TEMPLATES, OLD_TEMPLATE, TEMPLATE, TOKENIZER_FILES
from ..sources.vocabulary import with_vocabulary
from .files import Content, Entry, FileEntry, Piece, write_bytes, write_json, write_pieces, write_safetensors
from .manifest import MANIFEST, SCALES_FILE, STATS, BundleLayer
from .peft import PEFT_PREFIX, coded_config, peft_adapter

SHARD_BYTES = 5 * 10**9
# Of a configuration: what only holds for the files that it lay beside.
OF_THE_SOURCE = (
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "quantization_config",
    "compression_config",
    "transformers_weights",
)


def write_base(folder: Path, pieces: Sequence[Piece], content: Content) -> dict[str, FileEntry]:
    """The average's weights, from its pieces."""
    entries = [(piece.key, piece.dtype, piece.shape, piece.bytes) for piece in pieces]
    return write_weights(folder, entries, lambda index: content(pieces[index]))


def write_weights(
    folder: Path, entries: Sequence[Entry], content: Callable[[int], Iterable[bytes]]
) -> dict[str, FileEntry]:
    """A checkpoint's weights: one file, or shards of at most 5 GB with the index that transformers reads.

    Args:
        content: the bytes of the entry with that number, asked for once and in order.
    """
    shards: list[list[int]] = [[]]
    for index, (_, _, _, size) in enumerate(entries):
        if shards[-1] and sum(entries[i][3] for i in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(index)
    many = len(shards) > 1
    names = [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        for i in range(len(shards))
    ]
    written = {}
    for name, shard in zip(names, shards, strict=True):
        chunks = (chunk for index in shard for chunk in content(index))
        written[name] = write_safetensors(folder / name, [entries[i] for i in shard], chunks)
    if many:
        weight_map = {entries[i][0]: name for name, shard in zip(names, shards, strict=True) for i in shard}
        total = {"total_size": sum(entry[3] for entry in entries)}
        found = {"metadata": total, "weight_map": weight_map}
        written[SAFETENSORS_INDEX] = write_json(folder / SAFETENSORS_INDEX, found)
    return written


def write_expert(
    folder: Path,
    expert: str,
    pieces: Sequence[Piece],
    scales: Mapping[str, float],
    layers: Sequence[BundleLayer],
    content: Content,
    *,
    code: Code,
    tied_embedding: str | None,
    rows: Sequence[int] = (),
) -> dict[str, FileEntry]:
    """One expert as a PEFT adapter, with its ratios beside it. Returns paths relative to `folder`.

    With a code that PEFT does not know, it is a folder that PEFT, and whatever reads its adapters, refuses.

    Args:
        pieces: keys are names of the model, without PEFT's prefix.
        rows: its own of the bundle's tables.
    """
    home = f"experts/{expert}"
    file = f"{home}/{code.file_name}"
    if code.peft_readable:
        config, pieces = peft_adapter(expert, pieces, layers, tied_embedding=tied_embedding, rows=rows)
    else:
        config = coded_config(code)
        pieces = [replace(p, key=PEFT_PREFIX + p.key) for p in sorted(pieces, key=lambda p: natural_key(p.key))]
    written = {
        f"{home}/adapter_config.json": write_json(folder / home / "adapter_config.json", config),
        file: write_pieces(folder / file, pieces, content),
    }
    if scales:
        written[f"{home}/{SCALES_FILE}"] = write_scales(folder / home / SCALES_FILE, scales)
    return written


def write_scales(file: Path, scales: Mapping[str, float]) -> FileEntry:
    """rho_i of every tensor, float32 [1], under the tensor's checkpoint name."""
    entries = [(tensor, "F32", (1,), 4) for tensor in scales]
    return write_safetensors(file, entries, (np.float32(ratio).tobytes() for ratio in scales.values()))


def copy_model_files(
    source: Path, folder: Path, config: dict[str, Any], *, code: bool, tokenizer: Path | None = None
) -> dict[str, FileEntry]:
    """Configuration, generation settings, tokenizer and chat templates, byte by byte.

    Args:
        code: Python files come along: only with the user's consent.
        tokenizer: where tokenizer and chat templates lie, if not in `source`.
    """
    written = {"config.json": write_json(folder / "config.json", config)}
    words = tokenizer or source
    files = [words / name for name in (*TOKENIZER_FILES, TEMPLATE, OLD_TEMPLATE)]
    files += [*sorted(words.glob(f"{MORE_TEMPLATES}/*.jinja")), source / GENERATION]
    files += sorted(source.glob("*.py")) if code else []
    for file in (file for file in files if file.is_file()):
        name = f"{MORE_TEMPLATES}/{file.name}" if file.parent.name == MORE_TEMPLATES else file.name
        written[name] = write_bytes(folder / name, file.read_bytes())
    return written


def bundle_config(
    config: Mapping[str, Any], *, dtype: str, tied: bool, code: bool, vocabulary: int | None = None
) -> dict[str, Any]:
    """The average's config.json: the first expert's, with the bundle's dtype and tying.

    Args:
        vocabulary: rows of the tables, where they are not those of the configuration.
    """
    changed = {key: value for key, value in config.items() if key not in OF_THE_SOURCE}
    if not code:
        changed.pop("auto_map", None)
    changed["dtype"] = dtype
    if "tie_word_embeddings" in changed or not tied:
        changed["tie_word_embeddings"] = tied
    return changed if vocabulary is None else with_vocabulary(changed, vocabulary)


def write_stats(folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """merge_stats.jsonl."""
    write_bytes(folder / STATS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_manifest(folder: Path, text: str) -> None:
    """polymerge.json, the last file of a bundle to be written."""
    write_bytes(folder / MANIFEST, text.encode())


def tool_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {}
    for package in ("torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def clear(folder: Path) -> None:
    """An empty folder in the place of whatever an interrupted assembly left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
