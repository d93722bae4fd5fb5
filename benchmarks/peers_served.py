"""What serving costs, polymerge against its peers: speed, merge time and routing, in one run.

    python benchmarks/peers_served.py --mergekit MERGEKIT/bin/python          # the demo's three experts
    python benchmarks/peers_served.py --mergekit ... --bundle BUNDLE --data ../shared/data          # a bundle's sources
    python benchmarks/peers_served.py --mergekit ... --experts NAME=FOLDER ... --data ../shared/data

The experts must come from the demo's base, SmolLM2-135M-Instruct. benchmarks/peers.py has the strongest peers, all
bytes and more requests, by teacher forcing.

Every row of benchmarks/peer_methods/table.py is merged in a process of its own, then loaded and measured here: accuracy
of greedy answers, KL to the original expert on its own requests, new tokens a second of a batch that mixes all experts.
`--work FOLDER` keeps the rows; a run that was stopped, or another with `--only`, goes on there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from chosen import add_arguments, demo_base, demo_experts, named_sources
from peer_methods.measure import Held, measure
from peer_methods.mergekit import mergekit_version
from peer_methods.table import METHODS, Method, one_model
from peer_methods.task import Task
from polymerge.cli.logs import hush_libraries
from polymerge.demo.skills import Skill, read_skills

# Training requests of every expert that routers learn from.
ROUTER_TEXTS = 128


def experts_of(options: argparse.Namespace, base: Path) -> tuple[list[Skill], dict[str, str]]:
    """The skills with their held-out requests, and the experts' folders."""
    sources = named_sources(options)
    if sources:
        return read_skills(options.data, list(sources), train=ROUTER_TEXTS, test=options.limit), sources
    skills, sources = demo_experts(base)
    return [Skill(s.name, s.train, s.test[: options.limit]) for s in skills], sources


def run(method: Method, task: Task, held: Held, work: Path, rows: int) -> dict[str, Any]:
    """One row: merged and measured, unless the work folder holds it. The merge is deleted."""
    folder = work / method.folder
    note = folder.with_suffix(".json")
    if note.exists():
        finished: dict[str, Any] = json.loads(note.read_text())
        return finished
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    cost = method.merge(task, folder)
    beside, whole = method.stored(task, folder), one_model(task)
    row = {
        "method": method.name,
        "chosen": method.chosen,
        "bytes_beside": beside,
        "bytes_over_one_model": (whole + beside) / whole,
        "merge_seconds": cost.seconds,
        "merge_peak": cost.peak,
        **measure(method.serve(task, folder), held, rows),
    }
    gc.collect()
    shutil.rmtree(folder)
    note.write_text(json.dumps(row, indent=1) + "\n")
    return row


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    skills = list(rows[0]["accuracy"])
    columns = ["method", "expert", "beside", "of one", *skills, "mean", *(f"KL {s}" for s in skills), "KL"]
    table = Table(*columns, "merge s", "peak GiB", "tokens/s")
    for row in rows:
        merged = row["merge_peak"] > 0
        table.add_row(
            row["method"],
            row["chosen"],
            f"{row['bytes_beside'] / 1e6:.1f} MB",
            f"{row['bytes_over_one_model']:.3f}",
            *(f"{row['accuracy'][skill]:.1%}" for skill in skills),
            f"{mean(row['accuracy']):.1%}",
            *(f"{row['kl'][skill]:.2g}" for skill in skills),
            f"{mean(row['kl']):.2g}",
            f"{row['merge_seconds']:.0f}" if merged else "",
            f"{row['merge_peak'] / 2**30:.2f}" if merged else "",
            f"{row['tokens_per_second']:.0f}" + ("" if row["one_batch"] else " in turn"),
        )
    console.print(table)


def keep_settings(file: Path, settings: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Rows in a work folder have the settings of its first run."""
    if file.exists() and json.loads(file.read_text()) != settings:
        parser.error(f"{file.parent}: holds rows of other settings; name another --work")
    file.write_text(json.dumps(settings, indent=1) + "\n")


def versions(task: Task) -> dict[str, str | None]:
    packages: dict[str, str | None] = {name: version(name) for name in ("polymerge", "torch", "transformers", "peft")}
    return packages | {"mergekit": mergekit_version(Path(task.mergekit) if task.mergekit else None)}


def main() -> None:
    names = [method.name for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="python of a virtual environment that holds mergekit")
    add_arguments(parser)
    parser.add_argument("--data", type=Path, help="with NAME/train.jsonl and test.jsonl for every one of these experts")
    parser.add_argument("--rate", type=float, default=0.95, help="polymerge's compress rate, which sets the bytes")
    parser.add_argument("--limit", type=int, default=64, help="held-out requests of each expert; the demo has 64")
    parser.add_argument("--compared", type=int, default=32, help="how many of them KL is measured on")
    parser.add_argument("--rows", type=int, default=12, help="rows of the batch whose speed is measured")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="METHOD", help="rows by name")
    parser.add_argument("--work", type=Path, help="keep finished rows here")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peers_served.json"))
    options = parser.parse_args()
    hush_libraries()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, at PEFT
    base = demo_base()
    skills, sources = experts_of(options, base)
    texts = {skill.name: [example.prompt for example in skill.train[:ROUTER_TEXTS]] for skill in skills}
    task = Task(sources, str(base), options.rate, texts, str(options.mergekit) if options.mergekit else None)
    console = Console(width=220)
    settings = {"limit": options.limit, "compared": options.compared, "batch_rows": options.rows, "rate": options.rate}
    settings |= {"experts": sources}
    chosen = [m for m in METHODS if m.name in options.only and (task.mergekit or not m.mergekit)]
    if not chosen:
        parser.error("these rows need --mergekit")
    held = Held.of(skills, sources, options.compared)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        keep_settings(work / "settings.json", settings, parser)
        task.save(work / "task.json")
        rows = []
        for method in chosen:
            console.print(method.name)
            rows.append(run(method, task, held, work, options.rows))
    show(rows, console)
    if task.mergekit is None:
        console.print("mergekit was left out: say --mergekit PYTHON (docs/benchmarks.md says how to install it)")
    cores = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"settings": settings, **cores, "versions": versions(task), "rows": rows}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
