"""One table of several runs of benchmarks/peers.py, as docs/benchmarks.md has it.

    python benchmarks/peers_joined.py demo=demo.json hard=hard.json real=real.json

A row is a method. Bytes are the first run's, and every other run's on disk where it has another number of experts; `KL`
is the mean over experts, `least kept` the accuracy of the expert that keeps least, with its interval, among those whose
original answers at least 20 requests rightly: fewer tell nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import interval

ENOUGH = 20
Rows = dict[tuple[str, str], dict[str, Any]]


def rows_of(report: Mapping[str, Any]) -> Rows:
    return {(row["method"], row["tables"]): row for row in report["rows"]}


def least_kept(row: Mapping[str, Any], requests: Mapping[str, int]) -> str:
    counted = [
        each["kept"]
        for name, each in row["experts"].items()
        if each["kept"] and each["original_accuracy"] * requests[name] >= ENOUGH
    ]
    return interval(min(counted, key=lambda kept: kept["share"], default=None))


def table(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    first, *others = runs
    experts = {name: len(run["settings"]["experts"]) for name, run in runs.items()}
    own_bytes = [name for name in others if experts[name] != experts[first]]
    columns = ["method", "embeddings", "disk", "resident", "GGUF"]
    for name in runs:
        columns += [f"disk, {experts[name]} experts"] * (name in own_bytes) + [f"KL {name}", "least kept"]
    of_runs = {name: rows_of(run) for name, run in runs.items()}
    lines = [_line(columns), f"|{' --- |' * len(columns)}"]
    for key, row in sorted(of_runs[first].items(), key=lambda item: item[1]["models"]["disk"]):
        cells = [*key, *(f"{share:.3f}" if share else "-" for share in row["models"].values())]
        for name, run in runs.items():
            cells += _cells(of_runs[name].get(key), run["settings"]["requests"], bytes_too=name in own_bytes)
        lines.append(_line([f"**{cells[0]}**" if cells[0].startswith("polymerge") else cells[0], *cells[1:]]))
    return lines


def _cells(row: Mapping[str, Any] | None, requests: Mapping[str, int], *, bytes_too: bool) -> list[str]:
    if row is None:
        return ["-"] * (2 + bytes_too)
    return [f"{row['models']['disk']:.3f}"] * bytes_too + [f"{row['kl']:.2g}", least_kept(row, requests)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    files = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if not files:
        raise SystemExit(__doc__)
    print("\n".join(table({name: json.loads(Path(file).read_text()) for name, file in files.items()})))


if __name__ == "__main__":
    main()
