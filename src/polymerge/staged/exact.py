"""Scores of choices as the competition's kit computes them to the letter (docs/competition.md).

It reads a choice's first token, which with many tokenizers is a special one, and scores those after it. Knows one
engine; everybody else scores a choice whole (`polymerge.staged.formatter`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.base import Engine, ScoreRequest

if TYPE_CHECKING:
    from ..model.assignment import RowExpert


def exact_scores(engine: Engine, text: str, choices: Sequence[str], expert: RowExpert) -> tuple[float, ...]:
    """Log-likelihoods in nats, one a choice; 0 for a choice of one token."""
    read = engine.encode(text, expert=expert)
    ids = [engine.encode(choice, expert=expert) for choice in choices]
    requests = [ScoreRequest([*read, choice[0]], choice[1:], expert) for choice in ids if len(choice) > 1]
    scores = iter(engine.loglikelihood(requests))
    return tuple(next(scores).log_likelihood if len(choice) > 1 else 0.0 for choice in ids)
