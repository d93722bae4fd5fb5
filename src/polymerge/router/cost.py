"""How sure a router must be before an expert is worth asking, by what the expert gains and loses against the fallback.

With a confidence c, asking gains `gain` with chance c, where the request is of the expert's field, and loses `loss`
otherwise: it is worth it from c = loss / (gain + loss) on. The assessment table knows both. What it cannot know is what
strangers lose, so it moves the usual threshold only so far. Knows names and accuracies; does not know vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .calibrate import Floats
from .table import Table

# Without a table: a known request that does not meet its expert costs as much as so many strangers that an expert
# answers (docs/log-router.md). What was kept away says less than users' own wording, so the threshold stays in bounds.
STRANGERS = 3.0
LEAST, HIGHEST = 0.15, 0.5
USUAL = 0.35  # where nothing was kept away
REFUSED = 0.95  # of the background, where the gate has met no requests
MOST = 2.0  # how much dearer or cheaper than usual a table makes a mistake, at most


def usual(known: Floats | None, strange: Floats) -> float:
    """The threshold without a table: where what lost requests and answered strangers cost is even.

    Args:
        known: [n], what the gate made of requests whose wording it had not seen. None, where it has met no requests:
            its probabilities mean nothing but an order then.
        strange: [m], what it made of texts of the background whose topics it had not seen.
    """
    if not len(strange):
        return USUAL
    if known is None:
        return float(np.quantile(strange, REFUSED))
    places = np.sort(np.concatenate([known, strange]))
    lost = np.searchsorted(np.sort(known), places) / len(known)
    answered = 1 - np.searchsorted(np.sort(strange), places) / len(strange)
    even = places[np.argmax(STRANGERS * lost >= answered)]
    return min(max(float(even), LEAST), HIGHEST)


def thresholds(experts: Mapping[str, str], fallback: str, table: Table | None, usually: float) -> dict[str, float]:
    """field -> the least confidence at which its expert answers; only fields that the table tells enough about.

    Args:
        experts: field -> expert.
        usually: the threshold that is moved.
    """
    gains = {field: _gain(table or {}, field, expert, fallback) for field, expert in experts.items()}
    chosen = {}
    for field, gain in gains.items():
        others = [_gain(table or {}, other, experts[field], fallback) for other in experts if other != field]
        losses = [-other for other in others if other is not None]
        if gain is not None and losses:
            chosen[field] = _threshold(gain, sum(losses) / len(losses), usually)
    return chosen


def _gain(table: Table, field: str, expert: str, fallback: str) -> float | None:
    """What the expert is right more often than the fallback in this field."""
    row = table.get(field, {})
    return row[expert] - row[fallback] if expert in row and fallback in row else None


def _threshold(gain: float, loss: float, usually: float) -> float:
    dearer = max(loss, 0.0) / gain if gain > 0 else MOST
    odds = usually / (1 - usually) * min(max(dearer, 1 / MOST), MOST)
    return odds / (1 + odds)
