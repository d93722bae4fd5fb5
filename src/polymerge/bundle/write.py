"""A bundle's files beside its experts' tensors: shards and index, configuration, scales, statistics, manifest.

Run twice, it writes the same bytes (the statistics carry seconds, so they are not in the manifest's list of files).
Knows names and formats of files; does not know how a tensor was computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..sources.checkpoint import SAFETENSORS_INDEX
from ..sources.persona import GENERATION, MORE_TEMPLATES, OLD_TEMPLATE, PROCESSOR_FILES, TEMPLATE, TOKENIZER_FILES
from ..sources.vocabulary import with_vocabulary
from .files import Entry, FileEntry, write_bytes, write_json, write_safetensors
from .manifest import MANIFEST, STATS

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


def shards_of(sizes: Iterable[tuple[str, int]]) -> dict[str, list[str]]:
    """File -> its tensors: one file, or shards of at most 5 GB, which part no tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for tensor, size in sizes:
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[Entry]]) -> dict[str, FileEntry]:
    """The index that transformers reads, where there is more than one shard."""
    if len(shards) == 1:
        return {}
    weight_map = {entry.key: file for file, entries in shards.items() for entry in entries}
    total = sum(entry.bytes for entries in shards.values() for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {SAFETENSORS_INDEX: write_json(folder / SAFETENSORS_INDEX, index)}


def write_weights(
    folder: Path, entries: Sequence[Entry], content: Callable[[int], Iterable[bytes]]
) -> dict[str, FileEntry]:
    """A checkpoint's weights, whose sizes are known: one file, or shards with their index.

    Args:
        content: the bytes of the entry with that number, asked for once and in order.
    """
    place = {entry.key: number for number, entry in enumerate(entries)}
    shards = {
        file: [entries[place[key]] for key in keys]
        for file, keys in shards_of((entry.key, entry.bytes) for entry in entries).items()
    }
    written = {}
    for file, shard in shards.items():
        chunks = (chunk for entry in shard for chunk in content(place[entry.key]))
        written[file] = write_safetensors(folder / file, shard, chunks)
    return written | write_index(folder, shards)


def write_scales(file: Path, scales: Mapping[str, float]) -> FileEntry:
    """rho_i of every tensor, float32 [1], under the tensor's checkpoint name."""
    entries = [Entry(tensor, "F32", (1,), 4) for tensor in scales]
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
    files += [source / name for name in PROCESSOR_FILES]
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


def ties(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of `bundle_config` ties head and embedding: where it says nothing, its architecture does
    (Gemma, GPT-2)."""
    return bool(config.get("tie_word_embeddings", True))


def write_stats(folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """merge_stats.jsonl."""
    write_bytes(folder / STATS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_manifest(folder: Path, text: str) -> None:
    """polymerge.json, the last file of a bundle to be written."""
    write_bytes(folder / MANIFEST, text.encode())


def tool_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    versions = {}
    for package in ("torch", "transformers", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
