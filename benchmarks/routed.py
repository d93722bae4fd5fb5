"""What routing is for: how many shifted rows are answered rightly, with the router, with an oracle, never abstaining.

The experts of one bundle, called as their fields are (by default the three of `benchmarks/hard.py`), answer by teacher
forcing: an answer is right where every token of it and the end is the likeliest. A model is asked for the rows that
some draw sends to it and for no others: nearly all rows are asked of two models, not of all. Knows rows and right or
wrong; the gate is `shift.py`'s.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chosen import demo_base
from hard import hard_experts
from polymerge import merge
from polymerge.demo.train import format_prompt
from polymerge.engine import ScoreRequest
from polymerge.engine.local.engine import HFEngine
from polymerge.router.table import AVERAGE
from shift import Draw, Judged, Row


def hard_bundle(data: Path, folder: Path) -> Path:
    """The bundle of the hard experts: merged on first use."""
    if not (folder / "polymerge.json").is_file():
        _, sources = hard_experts(demo_base(), data)
        folder.parent.mkdir(parents=True, exist_ok=True)
        merge({"experts": sources}, folder)
    return folder


def few_of(rows: Sequence[Row], count: int) -> list[Row]:
    """At most so many rows of every field and kind; only those whose answer is known."""
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for row in rows:
        if row.answer and seen[row.field, row.kind] < count:
            seen[row.field, row.kind] += 1
            chosen.append(row)
    return chosen


def needed(draws: Sequence[Draw]) -> dict[str, list[int]]:
    """Expert, "average" too -> numbers of the rows that some draw sends to it."""
    rows: dict[str, set[int]] = {}
    for draw, names, columns in _sent(draws):
        known = np.flatnonzero(draw.labels >= 0)
        for column in columns.values():
            for number in known:
                rows.setdefault(names[column[number]], set()).add(int(number))
    return {name: sorted(numbers) for name, numbers in rows.items()}


def outcomes(engine: HFEngine, rows: Sequence[Row], wanted: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Expert -> [rows], 1 where it answers rightly, 0 where not, nan where it is not asked. One forward pass each."""
    end = int(engine.tokenizer.eos_token_id)
    right = {}
    for expert, numbers in wanted.items():
        asked = None if expert == AVERAGE else expert
        requests = [
            ScoreRequest(
                engine.encode(format_prompt(rows[n].text)), [*engine.encode(rows[n].answer, special=False), end], asked
            )
            for n in numbers
        ]
        right[expert] = np.full(len(rows), np.nan)
        right[expert][list(numbers)] = [score.is_greedy for score in engine.loglikelihood(requests)]
    return right


def accuracies(draws: Sequence[Draw], right: Mapping[str, Any]) -> dict[str, list[float]]:
    """Accuracy on all known rows by who chooses; over draws, with 95% intervals.

    Args:
        right: as `outcomes` gives it, for all rows that are `needed`.
    """
    chosen: dict[str, list[float]] = {}
    for draw, names, columns in _sent(draws):
        table = np.array([right.get(name, np.full(len(draw.labels), np.nan)) for name in names])
        known = np.flatnonzero(draw.labels >= 0)
        for name, column in columns.items():
            chosen.setdefault(name, []).append(float(table[column[known], known].mean()))
    return {name: [statistics.mean(values), _interval(values)] for name, values in chosen.items()}


def _sent(draws: Sequence[Draw]) -> Iterator[tuple[Draw, list[str], dict[str, Any]]]:
    """Each draw with the models' names, and who chooses -> the number of the model for every row."""
    for draw in draws:
        yield draw, [*draw.fields, AVERAGE], _choices(draw.judged, len(draw.fields), draw.labels)


def _choices(judged: Judged, average: int, labels: Any) -> dict[str, Any]:
    return {
        "oracle": np.maximum(labels, 0),
        "routed": np.where(judged.asked, judged.likeliest, average),
        "never abstaining": judged.likeliest,
        "the average alone": np.full(len(labels), average),
    }


def _interval(values: Sequence[float]) -> float:
    return 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
