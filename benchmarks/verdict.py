"""How much of an expert a share of its residual's energy is: what `inspect` says in words is read off here.

    python benchmarks/verdict.py                                             # the demo's three experts
    python benchmarks/verdict.py --set hard --data ../shared/data            # experts of real data, benchmarks/hard.py

Every recipe is merged and each expert held against its original on held-out requests. A line has the energy kept, the
relative error of its weights, and what is measured: KL, top-1, and the share of the original's accuracy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from chosen import demo_base, demo_experts
from hard import SETS, real_experts
from polymerge import inspect_bundle, load_model, merge
from polymerge.bundle.bundle import Bundle
from polymerge.cli.logs import hush_libraries
from polymerge.demo.skills import Skill
from polymerge.model.mixed import MixedModel
from polymerge.search.agreement import Reference
from polymerge.search.examples import Example

TABLES = {choice: {"embeddings": choice, "lm_head": choice} for choice in ("average", "keep", "compress")}
# code, rate, what becomes of embeddings and heads, their rate
GRID = [
    ("factors", 0.95, "average", 0.95),
    ("factors", 0.95, "keep", 0.95),
    ("factors", 0.9, "keep", 0.95),
    ("int4", 0.975, "compress", 0.975),
    ("int4", 0.975, "compress", 0.95),
    ("int4", 0.95, "average", 0.95),
    ("int4", 0.95, "compress", 0.95),
    ("int4", 0.95, "compress", 0.9),
    ("int4", 0.95, "keep", 0.95),
    ("int4", 0.9, "compress", 0.9),
    ("int4", 0.9, "keep", 0.95),
    ("int4", 0.8, "compress", 0.9),
]


def measured(
    sources: dict[str, str], references: dict[str, Reference], scratch: Path, grid: list[tuple[str, float, str, float]]
) -> Iterator[dict[str, Any]]:
    for code, rate, tables, table_rate in grid:
        recipe = {"experts": sources, "code": code, "compress_rate": rate, "embedding_rate": table_rate}
        began = time.monotonic()
        bundle = merge({**recipe, **TABLES[tables]}, scratch / "bundle", overwrite=True)
        yield from _lines(bundle, references, recipe | {"tables": tables}, time.monotonic() - began)


def _lines(
    bundle: Bundle, references: dict[str, Reference], recipe: dict[str, Any], seconds: float
) -> Iterator[dict[str, Any]]:
    inspection = inspect_bundle(bundle)
    model = load_model(bundle)
    for summary in inspection.experts:
        name = summary.name
        agreement = references[name].against(partial(_logits, model, name), model.device)
        yield {
            "code": recipe["code"],
            "rate": recipe["compress_rate"],
            "tables": recipe["tables"],
            "table_rate": recipe["embedding_rate"],
            "models": inspection.share_of_one_model,
            "expert": name,
            "energy_kept": summary.energy_kept,
            "relative_error": summary.relative_error,
            "moved": summary.lost_by_averaging,
            "kl": agreement.kl,
            "top1": agreement.top1,
            "kept": agreement.kept,
            "original": agreement.original_accuracy,
            "merge_seconds": round(seconds),
        }


def _logits(model: MixedModel, expert: str, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, experts=expert).logits
    return logits


def experts_of(options: argparse.Namespace) -> tuple[list[Skill], dict[str, str]]:
    base = demo_base()
    return demo_experts(base) if options.set == "demo" else real_experts(base, options.data, options.set)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="demo", choices=("demo", *SETS))
    parser.add_argument("--data", type=Path, help="with NAME/train.jsonl and NAME/test.jsonl")
    parser.add_argument("--limit", type=int, default=64, help="held-out requests of each expert")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of the grid's rows; by default all")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/verdict.jsonl"))
    options = parser.parse_args()
    hush_libraries()
    skills, sources = experts_of(options)
    references = {
        s.name: Reference(sources[s.name], [Example(e.prompt, e.answer) for e in s.test[: options.limit]])
        for s in skills
    }
    grid = [GRID[number] for number in options.rows] if options.rows else GRID
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, options.output.open("a") as lines:
        for line in measured(sources, references, Path(scratch), grid):
            lines.write(json.dumps({"set": options.set, **line}) + "\n")
            lines.flush()
            kept = "-" if line["kept"] is None else f"{line['kept']:.1%}"
            print(
                f"{line['code']:8} {line['rate']:<6} {line['tables']:9}{line['table_rate']:<6}"
                f"{line['models']:.3f}  {line['expert']:8} energy {line['energy_kept']:.1%} "
                f"error {line['relative_error']:.2g}  KL {line['kl']:.2g}  top-1 {line['top1']:.1%}  kept {kept}",
                flush=True,
            )


if __name__ == "__main__":
    main()
