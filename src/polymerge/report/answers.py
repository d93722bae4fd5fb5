"""The report's first answer, in words: which expert answers as before, which may not, and what to change.

Knows a bundle's verdicts and a demo's rows; thresholds of a prediction are `polymerge.bundle.verdict`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..bundle.inspect import Inspection
from ..bundle.verdict import SAID, Answer, Verdict
from .blocks import section

MARKS = {"as before": "good", "nearly as before": "near", "perhaps otherwise": "bad"}
# Shares of its accuracy from which on a measured expert is said to answer as before, and nearly so.
AS_BEFORE, NEARLY = 0.99, 0.95


def predicted_answers(inspection: Inspection) -> str:
    """Every expert's verdict, and the change of the recipe that helps most of them."""
    lines = [_line(e.name, MARKS[e.verdict.answers], e.verdict.words) for e in inspection.experts]
    said = _list(lines) + _change([e.verdict for e in inspection.experts])
    return section("Do they answer as before?", PREDICTED, said)


PREDICTED = (
    "Predicted from how much of each expert's difference from the average is kept, on the safe side. Held-out requests "
    "measure it: polymerge merge --prompts NAME=FILE.jsonl."
)


def measured_answers(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was measured on held-out requests, an expert a line."""
    lines = []
    for row in rows:
        kept = row["kept"]
        answers: Answer = (
            "as before" if kept >= AS_BEFORE else "nearly as before" if kept >= NEARLY else "perhaps otherwise"
        )
        words = f"{SAID[answers]}: keeps {kept:.1%} of its accuracy; the plain average has {row['average']:.1%}"
        lines.append(_line(row["skill"], MARKS[answers], f"{words} right"))
    return section("Do they answer as before?", "Measured on held-out requests.", _list(lines))


def _list(lines: Sequence[str]) -> str:
    return f'<ul class="verdicts">{"".join(lines)}</ul>'


def _line(name: str, mark: str, words: str) -> str:
    return f'<li class="{mark}"><b>{escape(name)}</b>{_marked(words)}</li>'


def _marked(words: str) -> str:
    """Keys of a recipe, which stand in backticks, as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))


def _change(verdicts: Sequence[Verdict]) -> str:
    """What of the recipe to change, where one is short; the words of the expert that needs most."""
    cures = [verdict.cure for verdict in sorted(verdicts, key=lambda v: v.energy_kept) if verdict.cure]
    if not cures:
        return "" if any(v.answers != "as before" for v in verdicts) else "<p><b>Nothing to change.</b></p>"
    return f"<p><b>To change in the recipe, for all of them:</b> {_marked(cures[0])}</p>"
