"""Is an answer right, and how near is it? For rows of one's own data sets (`polymerge.evaluate.rows`).

exact match   after collapsing white space; where a row has `final`, of the last number in the answer
token F1      over words and signs, lower-cased
choices       the likeliest one, by its log-likelihood or by that for every character (lm-evaluation-harness's
              `acc` and `acc_norm`)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .rows import Row

# A minus belongs to a number unless it stands behind one: "5-3" ends with 3.
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_TOKEN = re.compile(r"\w+|[^\w\s]")


def is_right(row: Row, text: str) -> bool:
    """Exact match after collapsing white space, or of the last number where the row has `final`."""
    if row.final is not None:
        number = last_number(text)
        return number is not None and number == float(row.final.replace(",", ""))
    return text.split() == row.answer.split()


def last_number(text: str) -> float | None:
    """The last number of a text: 1,250.5 of "it is 1,250.5."."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def token_f1(answer: str, text: str) -> float:
    """Harmonic mean of precision and recall over words and signs, each counted as often as it stands there."""
    wanted, found = (Counter(_TOKEN.findall(part.lower())) for part in (answer, text))
    if not wanted or not found:
        return float(wanted == found)
    return 2 * (wanted & found).total() / (wanted.total() + found.total())


def likeliest(log_likelihoods: Sequence[float], choices: Sequence[str], *, by_length: bool = False) -> int:
    """The number of the likeliest choice, the first of equals. With `by_length` for every character of it."""
    scores = [value / (len(choice) if by_length else 1) for value, choice in zip(log_likelihoods, choices, strict=True)]
    return max(range(len(scores)), key=lambda number: scores[number])
