"""What routing is for: how many shifted rows are answered rightly, with the router, with an oracle, never abstaining.

Three experts of real data (`benchmarks/hard.py`) in one bundle answer every row by teacher forcing: an answer is right
where every token of it and the end is the likeliest. Knows rows and right or wrong; the gate is `shift.py`'s.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chosen import demo_base
from hard import hard_experts
from polymerge import merge
from polymerge.demo.train import format_prompt
from polymerge.engine import ScoreRequest
from polymerge.engine.local.engine import HFEngine
from shift import Draw, Judged, Row


def hard_bundle(data: Path, folder: Path) -> Path:
    """The bundle of the hard experts: merged on first use."""
    if not (folder / "polymerge.json").is_file():
        _, sources = hard_experts(demo_base(), data)
        folder.parent.mkdir(parents=True, exist_ok=True)
        merge({"experts": sources}, folder)
    return folder


def outcomes(bundle: Path, rows: Sequence[Row]) -> dict[str, list[bool]]:
    """Expert, "average" too -> whether it answers each row rightly; by one forward pass each."""
    engine = HFEngine.from_bundle(bundle)
    end = int(engine.tokenizer.eos_token_id)
    pairs = [(engine.encode(format_prompt(row.text)), [*engine.encode(row.answer, special=False), end]) for row in rows]
    right = {}
    for expert in (*engine.experts, None):
        scores = engine.loglikelihood([ScoreRequest(context, answer, expert) for context, answer in pairs])
        right[expert or "average"] = [score.is_greedy for score in scores]
    return right


def accuracies(draws: Sequence[Draw], right: dict[str, list[bool]]) -> dict[str, list[float]]:
    """Accuracy on all known rows by who chooses; over draws, with 95% intervals.

    Args:
        right: expert -> right or wrong of the draws' rows.
    """
    chosen: dict[str, list[float]] = {}
    for draw in draws:
        table = np.array([right[field] for field in draw.fields] + [right["average"]])
        known = draw.labels >= 0
        for name, column in _choices(draw.judged, len(draw.fields), draw.labels).items():
            of_rows = table[column[known], np.flatnonzero(known)]
            chosen.setdefault(name, []).append(float(of_rows.mean()))
    return {name: [statistics.mean(values), _interval(values)] for name, values in chosen.items()}


def _choices(judged: Judged, average: int, labels: Any) -> dict[str, Any]:
    return {
        "oracle": np.maximum(labels, 0),
        "routed": np.where(judged.asked, judged.likeliest, average),
        "never abstaining": judged.likeliest,
        "the average alone": np.full(len(labels), average),
    }


def _interval(values: Sequence[float]) -> float:
    return 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
