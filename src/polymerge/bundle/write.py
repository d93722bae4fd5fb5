"""Puts finished pieces together: the base's shards, every expert's PEFT adapter, scales, statistics and the manifest.

A pure function of the pieces: run twice, it writes the same bytes (the statistics carry seconds, so they are not
in the manifest's list of files). Knows PEFT's adapter format; does not know how a piece was computed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import ADAPTER_FILE, CODED_FILE, MANIFEST, PEFT_PREFIX, SCALES_FILE, STATS, TIED_ROWS, BundleLayer
from ..sources.checkpoint import SAFETENSORS_INDEX, natural_key
from ..recipe.merge import CodeName
from ..merging.journal import Entry, FileRecord, Piece, Staging, write_bytes, write_json, write_safetensors, zeros_piece

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


def write_base(staging: Staging, folder: Path, pieces: Sequence[Piece]) -> dict[str, FileRecord]:
    """The average's weights, from its pieces."""
    entries = [(piece.key, piece.dtype, piece.shape, piece.bytes) for piece in pieces]
    return write_weights(folder, entries, lambda index: staging.content(pieces[index]))


def write_weights(
    folder: Path, entries: Sequence[Entry], content: Callable[[int], Iterable[bytes]]
) -> dict[str, FileRecord]:
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
    staging: Staging,
    folder: Path,
    expert: str,
    pieces: Sequence[Piece],
    scales: Mapping[str, float],
    layers: Sequence[BundleLayer],
    *,
    code: CodeName,
    tied_embedding: str | None,
) -> dict[str, FileRecord]:
    """One expert as a PEFT adapter, with its ratios beside it. Returns paths relative to `folder`.

    With a code that PEFT does not know, it is a folder that PEFT, and whatever reads its adapters, refuses.

    Args:
        pieces: keys are names of the model, without PEFT's prefix.
    """
    home = f"experts/{expert}"
    if code == "factors":
        config, pieces = peft_adapter(expert, pieces, layers, tied_embedding=tied_embedding)
        file = f"{home}/{ADAPTER_FILE}"
    else:
        config, file = coded_config(code), f"{home}/{CODED_FILE}"
        pieces = [replace(p, key=PEFT_PREFIX + p.key) for p in sorted(pieces, key=lambda p: natural_key(p.key))]
    written = {
        f"{home}/adapter_config.json": write_json(folder / home / "adapter_config.json", config),
        file: staging.write_safetensors(folder / file, pieces),
    }
    if scales:
        written[f"{home}/{SCALES_FILE}"] = write_scales(folder / home / SCALES_FILE, scales)
    return written


def peft_adapter(
    expert: str, pieces: Sequence[Piece], layers: Sequence[BundleLayer], *, tied_embedding: str | None
) -> tuple[dict[str, Any], list[Piece]]:
    """adapter_config.json, and the pieces of the adapter file under PEFT's names, with what PEFT needs beside them.

    Args:
        pieces: keys are names of the model, without PEFT's prefix.
    """
    pieces = sorted(_with_bias_everywhere(expert, pieces, layers), key=lambda piece: natural_key(piece.key))
    config = adapter_config([(p.key, p.shape) for p in pieces], layers, tied_embedding=tied_embedding)
    return config, [replace(piece, key=_stored_name(piece.key, tied_embedding)) for piece in pieces]


def coded_config(code: CodeName) -> dict[str, Any]:
    """adapter_config.json of an expert whose residuals have a code that PEFT does not know.

    PEFT looks the type up and stops with it in its message, so the type says what to do; vLLM and others look for
    the keys of a LoRA and for its weights' file, and find neither.
    """
    return {"peft_type": f"POLYMERGE_{code.upper()}: make a PEFT adapter of it with `polymerge export --to peft`"}


def write_scales(file: Path, scales: Mapping[str, float]) -> FileRecord:
    """rho_i of every tensor, float32 [1], under the tensor's checkpoint name."""
    entries = [(tensor, "F32", (1,), 4) for tensor in scales]
    return write_safetensors(file, entries, (np.float32(ratio).tobytes() for ratio in scales.values()))


def missing_siblings(keys: Iterable[str], layers: Iterable[BundleLayer]) -> list[BundleLayer]:
    """Parameters that an adapter needs although they are the base's.

    PEFT's `modules_to_save` takes whole modules: with an expert's own weight it wants the bias too, and the other way
    round.
    """
    have = set(keys)
    layers = list(layers)
    own = {layer.module for layer in layers if f"{layer.module}.{layer.parameter}" in have}
    return [layer for layer in layers if layer.module in own and f"{layer.module}.{layer.parameter}" not in have]


def adapter_config(
    tensors: Iterable[tuple[str, Sequence[int]]], layers: Iterable[BundleLayer], *, tied_embedding: str | None
) -> dict[str, Any]:
    """adapter_config.json for an adapter with these tensors (names of the model, shapes).

    Every module's own rank stands in `rank_pattern` and `alpha_pattern` with alpha = rank, so that the scale is
    1 under any reader's rule. Keys are escaped full names: PEFT matches them with `re.match(r"(.*\\.)?(key)$", name)`.
    An embedding that the head is tied to goes to `trainable_token_indices` (all of them), because PEFT's
    `modules_to_save` would leave the head with the base's weight, or want it stored twice.
    """
    ranks: dict[str, int] = {}
    own: set[str] = set()
    tokens: dict[str, list[int]] = {}
    lora_bias = False
    for name, shape in tensors:
        factor = _FACTOR.fullmatch(name)
        if factor:
            ranks[factor[1]] = shape[0] if factor[2] == "A" else shape[1]
        elif name.endswith(".lora_B.bias"):
            lora_bias = True
        elif tied_embedding and name == f"{tied_embedding}.weight":
            tokens[tied_embedding] = list(range(shape[0]))
        else:
            own.add(name.rpartition(".")[0])
    by_module = {layer.module: layer for layer in layers if layer.role == "linear"}
    fused = {m: r for m, r in ranks.items() if m in by_module and is_fused(by_module[m])}
    # transformers 5 holds a mixture's matrices in one parameter, for which PEFT takes the general rank alone.
    rank = next(iter(fused.values()), None) or (Counter(ranks.values()).most_common(1)[0][0] if ranks else 1)
    pattern = {re.escape(module): r for module, r in ranks.items() if r != rank}
    whole_blocks = own & {module for module, layer in by_module.items() if is_fused(layer)}
    return {
        # PEFT has no place for whole matrices of a fused block and would leave them out without a word; a type that
        # it does not know makes it refuse.
        "peft_type": "POLYMERGE_WHOLE_BLOCKS" if whole_blocks else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": lora_bias,
        "init_lora_weights": True,
        "fan_in_fan_out": any(layer.transposed for layer in by_module.values()),
        "target_modules": sorted(ranks, key=natural_key) or "dummy-target-modules",
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "modules_to_save": sorted(own, key=natural_key) or None,
        "trainable_token_indices": tokens or None,
    }


def is_fused(layer: BundleLayer) -> bool:
    """Whether the tensor is one matrix of a parameter that transformers holds fused (mixture-of-experts blocks)."""
    return layer.module == layer.tensor.removesuffix(".weight") and ".experts." in layer.module


def _with_bias_everywhere(expert: str, pieces: Sequence[Piece], layers: Sequence[BundleLayer]) -> list[Piece]:
    """PEFT's `lora_bias` is one switch for the whole adapter: with one bias, every factor pair needs one, and the
    other way round a bias needs a factor pair. What is missing is zeros."""
    have = {piece.key for piece in pieces}
    if not any(key.endswith(".lora_B.bias") for key in have):
        return list(pieces)
    filled = list(pieces)
    for layer in (layer for layer in layers if layer.role == "linear"):
        rows, columns = layer.shape[::-1] if layer.transposed else layer.shape
        a, b, bias = (f"{layer.module}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
        if a in have and bias not in have:
            filled.append(zeros_piece(expert, bias, "F32", (rows,)))
        if bias in have and a not in have:
            filled.append(zeros_piece(expert, a, "F32", (1, columns)))
            filled.append(zeros_piece(expert, b, "F32", (rows, 1)))
    return filled


def _stored_name(name: str, tied_embedding: str | None) -> str:
    if tied_embedding and name == f"{tied_embedding}.weight":
        name = tied_embedding + TIED_ROWS
    return PEFT_PREFIX + name


def copy_model_files(source: Path, folder: Path, config: dict[str, Any], *, code: bool) -> dict[str, FileRecord]:
    """Configuration, tokenizer and chat templates. Python files only with the user's consent (`code`)."""
    written = {"config.json": write_json(folder / "config.json", config)}
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    names += [str(f.relative_to(source)) for f in sorted(source.glob("additional_chat_templates/*.jinja"))]
    names += [file.name for file in sorted(source.glob("*.py"))] if code else []
    for name in names:
        written[name] = write_bytes(folder / name, (source / name).read_bytes())
    return written


def bundle_config(config: Mapping[str, Any], *, dtype: str, tied: bool, code: bool) -> dict[str, Any]:
    """The average's config.json: the first expert's, with the bundle's dtype and tying."""
    changed = {k: v for k, v in config.items() if k not in ("_name_or_path", "torch_dtype", "dtype")}
    if not code:
        changed.pop("auto_map", None)
    changed["dtype"] = dtype
    if "tie_word_embeddings" in changed or not tied:
        changed["tie_word_embeddings"] = tied
    return changed


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
