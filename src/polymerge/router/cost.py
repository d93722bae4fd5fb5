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

# Without a table: a stranger that an expert answers costs about half of a known request that does not
# meet its expert; chosen where known requests and strangers are both met (docs/log-router.md).
USUAL, LEAST = 0.35, 0.2
REFUSED = 0.85  # of the background is enough: more samples make a router surer than users' wording lets it be
MOST = 2.0  # how much dearer or cheaper than usual a table makes a mistake, at most


def usual(strange: Floats, *, bounded: bool = True) -> float:
    """The threshold without a table.

    Args:
        strange: [m], what the gate made of texts of the background whose topics it had not seen.
        bounded: off, where the gate has met no requests, so that its probabilities mean nothing but an order.
    """
    if not len(strange):
        return USUAL
    refusing = float(np.quantile(strange, REFUSED))
    return min(max(refusing, LEAST), USUAL) if bounded else refusing


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
