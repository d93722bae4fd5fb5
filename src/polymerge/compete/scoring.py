"""Scores where targets are known: accuracy for multiple choice, ROUGE for generation, as the kit's organisers report.

ROUGE is that of the `rouge-score` package, without stemming. The organisers' wrapper gives the middle of a bootstrap
over the rows; here it is the mean F-measure itself, which that middle estimates. Which choice a target means and ROUGE
are the kit's own questions; whether an answer in the user's data is right says `polymerge.data.score`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import MissingExtraError, install_line
from .table import CompetitionRow

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def check_scorable(rows: Sequence[CompetitionRow]) -> None:
    """Raises MissingExtraError where `score` would: before the work rather than after it."""
    if any(row.target is not None and not row.choices for row in rows):
        rouge([])


def score(rows: Sequence[CompetitionRow], predictions: Sequence[str]) -> dict[str, float]:
    """Means over the rows that have a target; without any, nothing.

    Raises:
        MissingExtraError: `rouge-score` is not installed.
    """
    known = [(row, text) for row, text in zip(rows, predictions, strict=True) if row.target is not None]
    closed = [target_index(row) == int(text) for row, text in known if row.choices]
    means = {"accuracy": sum(closed) / len(closed)} if closed else {}
    texts = [(row.target or "", text) for row, text in known if not row.choices]
    return means | (rouge(texts) if texts else {})


def target_index(row: CompetitionRow) -> int | None:
    """The right choice: a target is its index, as in the competition's files, or else its text."""
    target = (row.target or "").strip()
    whole = re.fullmatch(r"(\d{1,4})(\.0)?", target)
    if whole and int(whole[1]) < len(row.choices):
        return int(whole[1])
    return row.choices.index(target) if target in row.choices else None


def rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean F-measures over (target, prediction) pairs; nothing without any."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError(f"ROUGE needs rouge-score; {install_line('compete')}") from None
    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    scores = [scorer.score(target, prediction) for target, prediction in pairs]
    return {name: sum(result[name].fmeasure for result in scores) / len(scores) for name in ROUGE if scores}
