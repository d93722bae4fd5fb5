"""What becomes of embeddings and heads: bytes, and how far each expert is from its original, on held-out prompts.

    python benchmarks/embeddings.py                                                   # the demo's three experts
    python benchmarks/embeddings.py --train json,shell                                # two that moved far, trained here
    python benchmarks/embeddings.py --data ../shared/data --train support,math        # on the rows of a folder
    python benchmarks/embeddings.py --experts NAME=FOLDER ... --data ../shared/data   # any experts

One merge for every choice: averaged, compressed at several rates, kept. All else is the same, in one code. Every
original is run by transformers itself. Experts that are trained are cached.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from chosen import add_arguments, demo_base, demo_experts, named_sources
from polymerge import load_model, merge
from polymerge.cli.logs import hush_libraries
from polymerge.demo.run import DemoSettings, load_skills
from polymerge.demo.train import TrainSettings, fine_tune
from polymerge.search.agreement import Agreement, Reference
from polymerge.search.examples import Example, read_examples

RATES = (0.98, 0.95, 0.9)


@dataclass(frozen=True)
class Choice:
    """One line. Bytes of the whole bundle's weights, and of what experts have of embeddings and heads."""

    name: str
    bytes: int
    share_of_one_model: float
    table_bytes: int
    experts: Mapping[str, Agreement]

    @property
    def kl(self) -> float:
        return sum(agreement.kl for agreement in self.experts.values()) / len(self.experts)

    @property
    def top1(self) -> float:
        return sum(agreement.top1 for agreement in self.experts.values()) / len(self.experts)


def settings_of(rates: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """What a choice is called -> its keys of the recipe."""
    choices: dict[str, dict[str, Any]] = {"average": {"embeddings": "average", "lm_head": "average"}}
    for rate in rates:
        choices[f"compress, {rate:g}"] = {"embeddings": "compress", "lm_head": "compress", "embedding_rate": rate}
    return choices | {"keep": {}}


def measured(
    name: str, recipe: Mapping[str, Any], references: Mapping[str, Reference], folder: Path, averaged: int | None
) -> Choice:
    """
    Args:
        averaged: bytes of the same bundle with averaged tables, where it is known.
    """
    bundle = merge(recipe, folder)
    model, sizes = load_model(bundle), bundle.sizes()
    agreements = {
        expert: reference.against(lambda ids, expert=expert: model(ids, experts=expert).logits)  # type: ignore[misc]
        for expert, reference in references.items()
    }
    more = 0 if averaged is None else sizes.total - averaged
    return Choice(name, sizes.total, sizes.total / sizes.one_model, more, agreements)


def show(choices: list[Choice], console: Console) -> None:
    experts = list(choices[0].experts)
    columns = (f"{name}: KL, top-1" for name in experts)
    table = Table("embeddings", "bundle", "models", "embeddings", *columns, "KL", "times keep's")
    for row in choices:
        table.add_row(
            row.name,
            f"{row.bytes / 1e6:.1f} MB",
            f"{row.share_of_one_model:.3f}",
            f"{row.table_bytes / 1e6:.1f} MB",
            *(f"{row.experts[name].kl:.2g}, {row.experts[name].top1:.1%}" for name in experts),
            f"{row.kl:.2g}",
            f"{row.kl / choices[-1].kl:.2f}",
        )
    console.print(table)


def chosen_experts(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, list[Example]]]:
    """Expert -> its source, and its held-out requests."""
    sources, limit = named_sources(options), options.limit
    if sources:
        return sources, {name: read_examples(options.data / name / "test.jsonl", limit) for name in sources}
    if options.train:
        train = TrainSettings(options.steps, options.batch, options.learning_rate)
        settings = DemoSettings(output=Path(), data=options.data, skills=options.train.split(","), train=train)
        skills = load_skills(settings)
        sources = {skill.name: str(fine_tune(demo_base(), skill, train)) for skill in skills}
    else:
        skills, sources = demo_experts(demo_base())
    return sources, {s.name: [Example(e.prompt, e.answer) for e in s.test[:limit]] for s in skills}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--data", type=Path, help="with NAME/test.jsonl for every expert")
    parser.add_argument(
        "--train", metavar="NAMES", help="train experts for these folders of --data, or take the cached"
    )
    parser.add_argument("--steps", type=int, default=60, help="of the training")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--code", default="int4")
    parser.add_argument("--rate", type=float, default=0.95, help="of the linear layers")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="of embeddings and heads, by commas")
    parser.add_argument("--limit", type=int, default=24, help="held-out prompts of each expert")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    hush_libraries()
    sources, examples = chosen_experts(options)
    references = {name: Reference(source, examples[name]) for name, source in sources.items()}
    recipe = {"experts": sources, "compress_rate": options.rate, "code": options.code}
    choices: list[Choice] = []
    for name, keys in settings_of(tuple(map(float, options.rates.split(",")))).items():
        with tempfile.TemporaryDirectory() as folder:
            averaged = choices[0].bytes if choices else None
            choices.append(measured(name, {**recipe, **keys}, references, Path(folder) / "bundle", averaged))
        print(f"{name}: KL {choices[-1].kl:.2g}, {choices[-1].share_of_one_model:.3f} models", flush=True)
    show(choices, Console(width=160))
    print(f"{options.code} at {options.rate:g}, {options.limit} prompts each, torch {torch.__version__}")
    if options.output:
        figures = [asdict(row) | {"kl": row.kl, "top1": row.top1} for row in choices]
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
