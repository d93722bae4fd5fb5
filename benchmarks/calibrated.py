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
from collections.abc import Mapping
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
from polymerge.search.agreement import Agreement, Reference
from polymerge.search.examples import Example


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
    return {"bytes": bundle.sizes().total, "seconds": seconds, "experts": found}


def means(found: Mapping[str, Mapping[str, Agreement]]) -> tuple[dict[str, float], float, float, float]:
    """KL of each expert, mean KL, mean top-1, and the mean KL elsewhere."""
    own = {expert: kinds[expert] for expert, kinds in found.items()}
    other = [agreement.kl for expert, kinds in found.items() for of, agreement in kinds.items() if of != expert]
    kl, top1 = (sum(getattr(a, key) for a in own.values()) / len(own) for key in ("kl", "top1"))
    return {expert: agreement.kl for expert, agreement in own.items()}, kl, top1, sum(other) / max(1, len(other))


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
    kls_of = (f"KL {skill.name}" for skill in skills)
    table = Table("code", "calibrated", "models", *kls_of, "KL", "of plain", "top-1", "elsewhere", "merge")
    figures = []
    with tempfile.TemporaryDirectory() as place:
        texts = texts_of(skills, Path(place))
        for code in options.codes:
            plain = 0.0
            for calibration in ({}, texts):
                recipe = {"experts": sources, "code": code, "compress_rate": options.rate, "calibration": calibration,
                          "embeddings": "compress", "lm_head": "compress"}  # fmt: skip
                row = measured(recipe, references, Path(place))
                kls, kl, top1, elsewhere = means(row["experts"])
                plain = plain or kl
                one = (Path(sources[skills[0].name]) / "model.safetensors").stat().st_size
                table.add_row(code, "yes" if calibration else "", f"{row['bytes'] / one:.3f}",
                              *(f"{kls[s.name]:.2g}" for s in skills), f"{kl:.2g}", f"{kl / plain:.2f}", f"{top1:.2%}",
                              f"{elsewhere:.2g}", f"{row['seconds']:.0f} s")  # fmt: skip
                agreements = {e: {of: vars(a) for of, a in k.items()} for e, k in row.pop("experts").items()}
                figures.append({"code": code, "calibrated": bool(calibration), **row, "experts": agreements})
                print(f"{code} {'calibrated' if calibration else 'plain'}: KL {kl:.3g}", flush=True)
                if options.output:
                    options.output.write_text(json.dumps(figures, indent=1) + "\n")
    Console(width=170).print(table)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
