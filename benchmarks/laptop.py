"""One bundle on a machine without a GPU: the embedded engine against llama.cpp with what `export --to gguf` writes.

    python benchmarks/laptop.py                                  # speed and agreement; needs the extra `llamacpp`
    python benchmarks/laptop.py --bundle BUNDLE --types q8_0     # another bundle of the demo's experts

Speed: experts mixed, greedy answers, to 1, 8 and 32 clients, each server a process of its own; `all clients one expert`
is what llama.cpp gives where it need not take turns; `bare` is its own server with the same base and adapters, as it
comes, asked for an adapter by every request. Agreement: greedy answers of llama.cpp and of the embedded engine
to the same held-out requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from polymerge import Bundle
from polymerge.demo.skills import demo_skills
from polymerge.demo.train import format_prompt
from polymerge.engine import GenerateRequest
from polymerge.engine.llamacpp.folder import read_note
from polymerge.engine.llamacpp.lora import applied_adapter
from polymerge.engine.llamacpp.server import llama_server
from polymerge.engine.local.engine import HFEngine
from polymerge.export import export_gguf
from polymerge.host import cache_folder
from serve import TOKENS, Asked, Models, bundle_folder, drive, load, measured, named, peak_memory, server

EMBEDDED = "embedded"


def requests(count: int, experts: Sequence[str]) -> list[Asked]:
    """So many held-out requests of every expert, one expert after the other."""
    skills = {skill.name: skill for skill in demo_skills(train=1, test=count)}
    return [Asked(name, format_prompt(example.prompt)) for name in experts for example in skills[name].test]


def offline(bundle: Path, rows: Sequence[Asked]) -> list[str]:
    """What the embedded engine answers."""
    engine = HFEngine.from_bundle(bundle)
    return [a.text for a in engine.generate([GenerateRequest(row.prompt, row.expert, TOKENS) for row in rows])]


def arguments(bundle: Path, exported: Path | None) -> list[str]:
    """Of `polymerge serve`."""
    engine = ["transformers"] if exported is None else ["llamacpp", "--gguf", str(exported)]
    command = [sys.executable, "-m", "polymerge", "serve", str(bundle), "--engine", *engine]
    return [*command, "--port", "0", "--json", "--quiet"]


def bare(folder: Path, rows: Sequence[Asked], one: Sequence[Asked], clients: Sequence[int]) -> dict[str, Any]:
    """Figures of llama.cpp's own server on an exported folder. It runs in this process, as it does in polymerge's."""
    names, blank = list(read_note(folder).experts), [""] * len(rows)
    with llama_server(folder) as api:
        models: Models = {name: (api.url, {"lora": applied_adapter(names, name)}) for name in names}
        mixed, alone = (loaded(models, asked, clients, blank, api.headers) for asked in (rows, one))
    return {"mixed": mixed, "one expert": alone, "agreement": None, "peak_memory": None}


def loaded(
    models: Models,
    rows: Sequence[Asked],
    clients: Sequence[int],
    expected: Sequence[str],
    headers: Mapping[str, str] = {},
) -> dict[int, Any]:
    """Figures by the number of clients."""
    asyncio.run(drive(models, rows[:3], 3, headers=headers))  # the first requests warm caches and allocators
    return {count: measured(*asyncio.run(drive(models, rows, count, headers=headers)), expected) for count in clients}


def agreement(url: str, rows: Sequence[Asked], expected: Sequence[str]) -> dict[str, Any]:
    """How many answers are equal, by expert."""
    models = named(url, {row.expert for row in rows})
    answers, _ = asyncio.run(drive(models, rows, 4))
    told: dict[str, Any] = {}
    for name in sorted(models):
        equal = [a.text == e for a, e, row in zip(answers, expected, rows, strict=True) if row.expert == name]
        told[name] = {"equal": sum(equal), "of": len(equal)}
    return told


def print_result(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{result['requests']} requests, greedy, up to {TOKENS} tokens; first token p50 / p95")
    for column in ("engine", "clients", "tokens/s", "all one expert", "first token, ms", "peak memory"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, system in result["systems"].items():
        for clients, row in system["mixed"].items():
            first, alone = row["first_token_ms"], system["one expert"].get(clients)
            table.add_row(
                name, str(clients), f"{row['tokens_per_second']:.1f}",
                f"{alone['tokens_per_second']:.1f}" if alone else "", f"{first['p50']:.0f} / {first['p95']:.0f}",
                f"{system['peak_memory'] / 1e9:.2f} GB" if system["peak_memory"] else "",
            )  # fmt: skip
    console.print(table)
    for name, system in result["systems"].items():
        for expert, row in (system["agreement"] or {}).items():
            print(f"{name}: {expert}: {row['equal']} of {row['of']} answers equal the embedded engine's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="by default the demo's experts, published code")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0"])
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=48, help="of the speed, experts in turn")
    parser.add_argument("--prompts", type=int, default=60, help="of an expert, for the agreement")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("benchmark-laptop.json"))
    options = parser.parse_args()
    bundle = options.bundle or bundle_folder() / "bundle"
    experts, rows = list(Bundle.open(bundle).experts), load(options.requests)
    asked = requests(options.prompts, experts)
    one = [replace(row, expert=experts[0]) for row in rows]
    expected, equal, blank = offline(bundle, rows), offline(bundle, asked), [""] * len(rows)
    exports: dict[str, Path | None] = {EMBEDDED: None}
    for kind in options.types:
        name, folder = f"llama.cpp, {kind}", cache_folder() / f"bench-laptop-{kind}"
        export_gguf(bundle, folder, type=kind, overwrite=True)
        exports[name] = folder
    systems: dict[str, Any] = {}
    for name, exported in exports.items():
        with server(arguments(bundle, exported), options.cores) as (url, pid):
            systems[name] = {
                "mixed": loaded(named(url, experts), rows, options.clients, expected),
                "one expert": loaded(named(url, experts), one, options.clients, blank),
                "agreement": agreement(url, asked, equal) if exported else None,
                "peak_memory": peak_memory([pid]),
            }
        if exported:
            systems[f"{name}, bare"] = bare(exported, rows, one, options.clients)
    versions = {name: version(name) for name in ("polymerge", "torch", "transformers", "xllamacpp")}
    result = {"requests": len(rows), "systems": systems, "cores": options.cores, "versions": versions}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)


if __name__ == "__main__":
    main()
