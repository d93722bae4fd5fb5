"""polymerge against its strongest peers, with all bytes: the same experts, the same held-out requests, one run.

    python benchmarks/peers.py                                                        # the demo's three experts
    python benchmarks/peers.py --set real --data ../shared/data                       # or hard: experts of real data
    python benchmarks/peers.py --experts NAME=FOLDER ... --data ../shared/data        # any; or --bundle, its sources

The experts must come from the demo's base, SmolLM2-135M-Instruct. `real` and `hard` are those of benchmarks/hard.py,
trained unless the cache holds them.

Everything is measured by teacher forcing, as `polymerge sweep` does: one forward pass over a request and its right
answer gives KL and top-1 against the original expert, and whether greedy decoding would give the answer. Bytes are of
all experts and what they share, in units of one model in 16 bits: on disk, in memory as the method's own inference
holds them, and in a GGUF. benchmarks/peers_served.py has what serving costs: speed, merge time, routing.

`--work FOLDER` keeps rows and SVDs; a run that was stopped, or another with `--only`, goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chosen import add_arguments, demo_base, demo_experts, demo_requests, named_sources
from hard import SETS, real_experts
from peer_methods.paired import Kept, kept
from peer_methods.rows import ROWS, Row, Run
from peer_methods.task import Task
from polymerge.cli.logs import hush_libraries
from polymerge.demo.skills import Skill, read_skills
from polymerge.search.agreement import agreement

TRAIN_TEXTS = 128  # of every expert, for methods that calibrate or route


def experts_of(options: argparse.Namespace, base: Path) -> tuple[list[Skill], dict[str, str]]:
    """The skills with so many held-out requests as are asked for, and the experts' folders."""
    sources = named_sources(options)
    if sources:
        return read_skills(options.data, list(sources), train=TRAIN_TEXTS, test=options.limit), sources
    if options.set != "demo":
        skills, sources = real_experts(base, options.data, options.set)
    else:
        skills, sources = demo_experts(base)
        skills = demo_requests(skills, options.limit)
    return [Skill(s.name, s.train[:TRAIN_TEXTS], s.test[: options.limit]) for s in skills], sources


def measured(row: Row, run: Run) -> dict[str, Any]:
    """One row as plain data. Shares of bytes are of one model in 16 bits."""
    began = time.perf_counter()
    examples, sizes = row.measure(run)
    by_expert, mean = kept(examples)
    agreements = {name: agreement(each) for name, each in examples.items()}
    one = 2 * run.one_model
    return {
        "method": row.name,
        "tables": row.tables,
        "bytes": asdict(sizes),
        "models": {place: size and size / one for place, size in asdict(sizes).items()},
        "kl": sum(a.kl for a in agreements.values()) / len(agreements),
        "top1": sum(a.top1 for a in agreements.values()) / len(agreements),
        "kept": mean and asdict(mean),
        "experts": {
            name: asdict(each) | {"kept": asdict(by_expert[name]) if name in by_expert else None}
            for name, each in agreements.items()
        },
        "seconds": round(time.perf_counter() - began, 1),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    models = (f"{share:.3f}" if share else "-" for share in row["models"].values())
    experts = (f"{each['kl']:.2g}" for each in row["experts"].values())
    kept_ = (interval(each["kept"]) for each in row["experts"].values())
    cells = [row["method"], row["tables"], *models, *experts, f"{row['kl']:.2g}", f"{row['top1']:.1%}", *kept_]
    return "| " + " | ".join([*cells, interval(row["kept"])]) + " |"


def heading(names: Sequence[str]) -> str:
    columns = ["method", "embeddings", "disk", "resident", "GGUF", *(f"KL {n}" for n in names), "KL", "top-1"]
    columns += [*(f"kept {n}" for n in names), "kept"]
    return f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"


def interval(share: dict[str, float] | None) -> str:
    """`98.5% (96 to 100%)`."""
    if share is None:
        return "-"
    value = Kept(**share)
    return f"{value.share:.1%} ({value.low:.0%} to {value.high:.0%})".replace("%", "").replace(")", "%)")


def _title(row: Row) -> str:
    return f"{row.name}, {row.tables}"


def finished(row: Row, run: Run, work: Path) -> dict[str, Any]:
    """A row, from the work folder where it is there."""
    note = work / ("".join(c if c.isalnum() else "-" for c in _title(row)) + ".json")
    if not note.exists():
        note.write_text(json.dumps(measured(row, run), indent=1) + "\n")
    read: dict[str, Any] = json.loads(note.read_text())
    return read


def keep_settings(file: Path, settings: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Rows in a work folder have the settings of its first run."""
    if file.exists() and json.loads(file.read_text()) != settings:
        parser.error(f"{file.parent}: holds rows of other settings; name another --work")
    file.write_text(json.dumps(settings, indent=1) + "\n")


def parsed() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--set", default="demo", choices=("demo", *SETS))
    parser.add_argument("--data", type=Path, help="with NAME/train.jsonl and test.jsonl for every one of these experts")
    parser.add_argument("--limit", type=int, default=200, help="held-out requests of each expert")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose `method, embeddings` holds one of these")
    parser.add_argument("--work", type=Path, help="keep finished rows and SVDs here")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peers.json"))
    options = parser.parse_args()
    if options.data is None and (options.set != "demo" or options.bundle or options.experts):
        parser.error("these experts need --data")
    return parser, options


def main() -> None:
    parser, options = parsed()
    hush_libraries()
    base, console = demo_base(), Console(width=400)
    rows = [row for row in ROWS if not options.only or any(text in _title(row) for text in options.only)]
    if not rows:
        parser.error(f"no such row; there are {', '.join(dict.fromkeys(row.name for row in ROWS))}")
    skills, sources = experts_of(options, base)
    texts = {skill.name: [example.prompt for example in skill.train] for skill in skills}
    settings = {"limit": options.limit, "requests": {s.name: len(s.test) for s in skills}, "experts": sources}
    versions = {name: version(name) for name in ("polymerge", "torch", "transformers")}
    report = {"settings": settings, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "versions": versions}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        keep_settings(work / "settings.json", settings, parser)
        run = Run(Task(sources, str(base), 0.95, texts), skills, work)
        console.print(heading([skill.name for skill in skills]), markup=False)
        done = []
        for row in rows:
            done.append(finished(row, run, work))
            console.print(line(done[-1]), markup=False)
            options.output.write_text(json.dumps(report | {"rows": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
