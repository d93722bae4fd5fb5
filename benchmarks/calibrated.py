"""What calibration gains: bundles of equal bytes with and without it, on held-out requests and texts of other kinds.

    python benchmarks/calibrated.py                                          # the demo's three experts
    python benchmarks/calibrated.py --set real --data ../shared/data         # benchmarks/hard.py
    python benchmarks/calibrated.py --set hard --data ../shared/data

Every expert is calibrated with rows that it was trained on, which no measure sees. "Elsewhere" is the KL of the same
expert against its original on the other experts' held-out requests, for which nothing was calibrated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from chosen import demo_base, demo_experts
from hard import SETS, real_experts
from polymerge import load_model, merge
from polymerge.cli.logs import hush_libraries
from polymerge.demo.skills import Skill
from polymerge.search.agreement import Reference
from polymerge.search.examples import Example

TABLES = {"embeddings": "compress", "lm_head": "compress"}


def examples(skill: Skill, limit: int) -> list[Example]:
    """Held-out requests."""
    return [Example(example.prompt, example.answer) for example in skill.test[:limit]]


def texts_of(skills: list[Skill], folder: Path) -> dict[str, str]:
    """Files of rows that the experts were trained on."""
    files = {}
    for skill in skills:
        file = folder / f"{skill.name}.jsonl"
        rows = ({"prompt": example.prompt, "answer": example.answer} for example in skill.train)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[skill.name] = str(file)
    return files


def measured(recipe: dict[str, Any], references: Mapping[str, Mapping[str, Reference]], folder: Path) -> dict[str, Any]:
    """A bundle's bytes, seconds, and how near its experts are to their originals: each on its own requests, and their
    means there and elsewhere."""
    began = time.monotonic()
    bundle = merge(recipe, folder / "bundle", overwrite=True)
    seconds, model = time.monotonic() - began, load_model(bundle)
    found = {
        expert: {
            of: reference.against(lambda ids, expert=expert: model(ids, experts=expert).logits)  # type: ignore[misc]
            for of, reference in kinds.items()
        }
        for expert, kinds in references.items()
    }
    own = {expert: kinds[expert] for expert, kinds in found.items()}
    other = [agreement.kl for expert, kinds in found.items() for of, agreement in kinds.items() if of != expert]
    return {
        "bytes": bundle.sizes().total,
        "seconds": seconds,
        "kl": sum(agreement.kl for agreement in own.values()) / len(own),
        "top1": sum(agreement.top1 for agreement in own.values()) / len(own),
        "least_kept": min(agreement.kept for agreement in own.values() if agreement.kept is not None),
        "elsewhere": sum(other) / max(1, len(other)),
        "experts": {expert: vars(agreement) for expert, agreement in own.items()},
    }


def table_of(figures: Sequence[Mapping[str, Any]]) -> Table:
    """A row a bundle; every calibrated one follows its plain one."""
    kls = (f"KL {expert}" for expert in figures[0]["experts"])
    table = Table("code", "calibrated", "models", *kls, "KL", "of plain", "top-1", "least kept", "elsewhere", "merge")
    plain = 1.0
    for row in figures:
        plain = plain if row["calibrated"] else row["kl"]
        table.add_row(
            row["code"],
            "yes" if row["calibrated"] else "",
            f"{row['models']:.3f}",
            *(f"{agreement['kl']:.2g}" for agreement in row["experts"].values()),
            f"{row['kl']:.2g}",
            f"{row['kl'] / plain:.2f}",
            f"{row['top1']:.2%}",
            f"{row['least_kept']:.1%}",
            f"{row['elsewhere']:.2g}",
            f"{row['seconds']:.0f} s",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="demo", choices=["demo", *SETS])
    parser.add_argument("--data", type=Path, help="a folder with NAME/train.jsonl and NAME/test.jsonl")
    parser.add_argument("--codes", nargs="+", default=["factors", "int4", "entropy"])
    parser.add_argument("--rate", type=float, default=0.95)
    parser.add_argument("--limit", type=int, default=32, help="held-out requests of each expert")
    parser.add_argument("--elsewhere", type=int, default=8, help="requests of each other expert")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    hush_libraries()
    base = demo_base()
    skills, sources = demo_experts(base) if options.set == "demo" else real_experts(base, options.data, options.set)
    references = {
        skill.name: {
            other.name: Reference(
                sources[skill.name], examples(other, options.limit if other is skill else options.elsewhere)
            )
            for other in skills
        }
        for skill in skills
    }
    figures, one = [], (Path(sources[skills[0].name]) / "model.safetensors").stat().st_size
    with tempfile.TemporaryDirectory() as place:
        texts = texts_of(skills, Path(place))
        for code in options.codes:
            for calibration in ({}, texts):
                recipe = {"experts": sources, "code": code, "compress_rate": options.rate, "calibration": calibration}
                row = measured({**recipe, **TABLES}, references, Path(place))
                figures.append({"code": code, "calibrated": bool(calibration), "models": row["bytes"] / one, **row})
                print(f"{code} {'calibrated' if calibration else 'plain'}: KL {row['kl']:.3g}", flush=True)
                if options.output:
                    options.output.write_text(json.dumps(figures, indent=1) + "\n")
    Console(width=170).print(table_of(figures))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
