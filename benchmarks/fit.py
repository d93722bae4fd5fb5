"""How many experts fit a GPU: the bytes that `polymerge plan` counts, or an exported folder's own sizes.

    python benchmarks/fit.py --config llama-3-8b --gpu-memory 24 48 80
    python benchmarks/fit.py --export exported --gpu-memory 24

    usable = 0.9 x memory - base - cache, shared out among experts: residuals, and what each has of its own
    embedded engine: with the average's linear layers in 16 bits, int8 or nf4
    vLLM:            slots of one rank for all linear layers; one is spare

Nothing is run and no weight is read. Activations are in the tenth that is left (vLLM's `--gpu-memory-utilization`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from polymerge.engine.vllm.folder import padded_rank, read_note
from polymerge.merging.footprint import footprint, held_bytes
from polymerge.merging.plan import MergePlan, plan_merge, replanned
from polymerge.merging.work import USABLE

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
BASES = ("16bit", "int8", "nf4")
TABLES = ("keep", "compress", "average")


def plans_of(folder: str, tokens: int, residuals: str) -> list[MergePlan]:
    """Of two experts and of three with a configuration's shapes: what one more costs is what lies between."""
    return [
        plan_merge(
            {"experts": {f"e{n}": f"shapes/e{n}" for n in range(count)}, "config": folder, "dtype": "bfloat16"},
            weights=False,
            context=tokens,
            residuals=residuals,
        )
        for count in (2, 3)
    ]


def configured(name: str, folder: Path) -> str:
    """A folder with the configuration of that name, or the folder that was named."""
    if name not in KNOWN:
        return name
    config = LlamaConfig(**KNOWN[name], architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.max_position_embeddings = 2**20  # the cache is of many conversations together
    config.save_pretrained(folder)
    return str(folder)


def fits(memory: float, taken: float, each: float) -> int:
    """How many of `each` bytes fit."""
    return max(0, int((USABLE * memory - taken) / each))


def rows_of_config(
    name: str, memories: list[float], tokens: int, rates: list[float], residuals: str
) -> Iterator[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        two, three = plans_of(configured(name, Path(folder)), tokens, residuals)
        needs = footprint(two)
        cache = needs.bundle_cache * tokens // needs.bundle_tokens
        for rate in rates:
            for tables in TABLES:
                settings = {"compress_rate": rate, "embeddings": tables, "lm_head": tables}
                yield from _rows(replanned(two, **settings), replanned(three, **settings), memories, cache)  # type: ignore[arg-type]


def _rows(two: MergePlan, three: MergePlan, memories: list[float], cache: int) -> Iterator[dict[str, Any]]:
    each = held_bytes(three) - held_bytes(two)
    bases = {base: held_bytes(replace(two, base=base)) - 2 * each for base in BASES}
    linear = [task for task in two.tasks if task.record.role == "linear"]
    padded = padded_rank(max(task.rank for task in linear))
    slot = sum(sum(task.matrix_shape) for task in linear) * padded * two.dtype.itemsize
    for memory in memories:
        yield {
            "gpu": memory,
            "rate": two.recipe.compress_rate,
            "embeddings": two.recipe.embeddings,
            "base": bases["16bit"],
            "an_expert": each,
            "dense_models": fits(memory, cache, two.base_bytes),
            **{f"embedded_{base}": fits(memory, taken + cache, each) for base, taken in bases.items()},
            "vllm": max(0, fits(memory, bases["16bit"] + cache, slot) - 1),
        }


def rows_of_export(folder: Path, memories: list[float], tokens: int) -> Iterator[dict[str, Any]]:
    note = read_note(folder)
    needs = footprint(plans_of(str(folder), tokens, "decoded")[0])
    cache = needs.bundle_cache * tokens // needs.bundle_tokens
    for memory in memories:
        yield {
            "gpu": memory,
            "base": note.base_bytes,
            "cache": cache,
            "max_lora_rank": note.max_lora_rank,
            "slot": note.slot_bytes,
            "dense_models": fits(memory, cache, note.base_bytes),
            "vllm": max(0, fits(memory, note.base_bytes + cache, note.slot_bytes) - 1),
        }


def main() -> None:
    """Prints one table and, where asked, writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama-3-8b", help=f"{', '.join(KNOWN)} or a folder with a config.json")
    parser.add_argument("--residuals", default="decoded", help="in the embedded engine: decoded or packed")
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
        rows = list(rows_of_config(options.config, memories, options.tokens, options.rate, options.residuals))
    table = Table(title=f"experts that fit, of {options.export or options.config}, {options.tokens} tokens of cache")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            *(f"{v / 1e9:.2f} GB" if isinstance(v, float | int) and v > 1e6 else f"{v}" for v in row.values())
        )
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
