"""How many experts fit a GPU: arithmetic from an architecture's shapes, or from an exported folder's own sizes.

    python benchmarks/fit.py --config llama-3-8b --gpu-memory 24 48 80
    python benchmarks/fit.py --export exported --gpu-memory 24

    usable = 0.9 x memory - base - cache            cache = tokens x 2 x layers x kv_heads x head_dim x bytes
    embedded engine: usable / (residuals + own)     own: an expert's embedding and head, where they are kept
    vLLM:            usable / slot - 1              slot: factors of all linear layers at one rank; one slot is spare

Nothing is run and no weight is read. Activations are in the tenth that is left (vLLM's `--gpu-memory-utilization`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from polymerge.engine.vllm.folder import padded_rank, read_note
from polymerge.method.rsvd import rank_for_rate

KNOWN = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
USABLE = 0.9
BYTES = 2  # bfloat16


def shapes_of(name: str) -> tuple[Any, list[tuple[int, int]], list[tuple[int, int]], int]:
    """Configuration, shapes of the linear layers, shapes of embedding and head, and all parameters of a model."""
    config = LlamaConfig(**KNOWN[name]) if name in KNOWN else AutoConfig.from_pretrained(name, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    ends = [model.get_input_embeddings(), head]
    whole = sum(parameter.numel() for parameter in model.parameters())
    return config, [_shape(module) for module in linear], [_shape(module) for module in ends], whole


def _shape(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return rows, columns


def cache_bytes(config: Any, tokens: int) -> int:
    """Keys and values of so many tokens."""
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    total: int = tokens * 2 * config.num_hidden_layers * heads * width * BYTES
    return total


def fits(memory: float, base: int, cache: int, each: float) -> int:
    """How many of `each` bytes fit."""
    return max(0, int((USABLE * memory - base - cache) / each))


def rows_of_config(name: str, memories: list[float], tokens: int, rates: list[float]) -> Iterator[dict[str, Any]]:
    config, linear, ends, whole = shapes_of(name)
    base, cache = whole * BYTES, cache_bytes(config, tokens)
    tied = bool(config.tie_word_embeddings)
    own_bytes = sum(a * b for a, b in ends[: 1 if tied else 2]) * BYTES
    for rate in rates:
        ranks = [rank_for_rate(a, b, rate) for a, b in linear]
        residuals = sum(rank * (a + b) for rank, (a, b) in zip(ranks, linear, strict=True)) * BYTES
        padded = padded_rank(max(ranks))
        slot = sum(a + b for a, b in linear) * padded * BYTES
        for memory in memories:
            yield {
                "gpu": memory,
                "rate": rate,
                "base": base,
                "cache": cache,
                "residuals": residuals,
                "own": own_bytes,
                "max_lora_rank": padded,
                "slot": slot,
                "dense_models": fits(memory, 0, cache, base),
                "embedded_kept": fits(memory, base, cache, residuals + own_bytes),
                "embedded_averaged": fits(memory, base, cache, residuals),
                "vllm": max(0, fits(memory, base, cache, slot) - 1),
            }


def rows_of_export(folder: Path, memories: list[float], tokens: int) -> Iterator[dict[str, Any]]:
    note, config = read_note(folder), AutoConfig.from_pretrained(folder, local_files_only=True)
    cache = cache_bytes(config, tokens)
    for memory in memories:
        yield {
            "gpu": memory,
            "base": note.base_bytes,
            "cache": cache,
            "max_lora_rank": note.max_lora_rank,
            "slot": note.slot_bytes,
            "dense_models": fits(memory, 0, cache, note.base_bytes),
            "vllm": max(0, fits(memory, note.base_bytes, cache, note.slot_bytes) - 1),
        }


def main() -> None:
    """Prints one table and, where asked, writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama-3-8b", help=f"{', '.join(KNOWN)} or a folder with a config.json")
    parser.add_argument("--export", type=Path, help="a folder of `polymerge export --to vllm`, instead of --config")
    parser.add_argument("--gpu-memory", type=float, nargs="+", default=[24, 48, 80], help="GB")
    parser.add_argument("--tokens", type=int, default=32768, help="of all running conversations together")
    parser.add_argument("--rate", type=float, nargs="+", default=[0.95, 0.98], help="compress rates")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    memories = [gigabytes * 1e9 for gigabytes in options.gpu_memory]
    if options.export:
        rows = list(rows_of_export(options.export, memories, options.tokens))
    else:
        rows = list(rows_of_config(options.config, memories, options.tokens, options.rate))
    table = Table(title=f"experts that fit, of {options.export or options.config}, {options.tokens} tokens of cache")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            *(f"{v / 1e9:.2f} GB" if isinstance(v, float | int) and v > 1e6 else f"{v:g}" for v in row.values())
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
