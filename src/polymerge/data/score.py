"""The one judge: is an answer right, and how near is it? Its rules stand in docs/eval.md, "When an answer is right".

choices      the choice that was picked is the right one, character for character
final        the last number of the answer is that number; nothing else counts
JSON         where the right answer is a JSON object: an equal object, whatever the order of its keys
text         the same after collapsing white space

Pure functions on texts. Does not know files, rows or models. Two questions are others' own: whether greedy decoding
would give exactly an answer's tokens (`polymerge.search.sweep`), and the competition's accuracy by a choice's index and
ROUGE (`polymerge.compete.scoring`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from .rows import parse_object

# A minus is a sign unless it stands right behind what it may be taken from: "5-3" ends with 3, "=-3" with -3.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}%])(?P<sign>[-\u2212]))?"  # hyphen or the minus of mathematics
    r"[$€£¥]?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
)
_TOKEN = re.compile(r"\w+|[^\w\s]")


def is_right(text: str, answer: str, *, choices: Sequence[str] | None = None, final: str | None = None) -> bool:
    """Whether `text` says what `answer` says.

    Args:
        choices: the answer is one of these, and `text` the one that was picked.
        final: the number that counts.

    Raises:
        ValueError: `final` is not a number.
    """
    if choices:
        return text == answer
    if final is not None:
        wanted = as_number(final)
        if wanted is None:
            raise ValueError(f"final {final!r} is not a number")
        return last_number(text) == wanted
    return text.split() == answer.split() or same_object(text, answer)


def credit(text: str, answer: str, *, choices: Sequence[str] | None = None, final: str | None = None) -> float:
    """1 for a right answer; for another one 0 with choices or a number, and for free text the token F1, which forgives
    case and order."""
    if is_right(text, answer, choices=choices, final=final):
        return 1.0
    return 0.0 if choices or final is not None else token_f1(text, answer)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, exactly: 1250.5 of "it is $1,250.50."."""
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def as_number(text: str) -> Decimal | None:
    """The number that a text is, with its sign of a currency or percent; None where it is more or less than that."""
    whole = _NUMBER.fullmatch(text.strip().removesuffix("%"))
    return _value(whole) if whole else None


def same_object(text: str, answer: str) -> bool:
    """Whether both are JSON objects and equal: keys in any order, 2 equal to 2.0 but not to "2" or true, and white
    space in texts collapsed."""
    try:
        return _same(parse_object(text), parse_object(answer))
    except (ValueError, RecursionError):
        return False


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words and signs, lower-cased, each counted as often as it stands
    there (the F1 of SQuAD, Rajpurkar et al. 2016, arXiv 1606.05250, which drops signs and articles)."""
    given, wanted = (Counter(_TOKEN.findall(part.lower())) for part in (text, answer))
    if not wanted or not given:
        return float(wanted == given)
    return 2 * (wanted & given).total() / (wanted.total() + given.total())


def likeliest(log_likelihoods: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The number of the likeliest choice, the first of equals, as in lm-evaluation-harness: its `acc`, or with the
    choices' lengths its `acc_norm`."""
    scores = [value / size for value, size in zip(log_likelihoods, lengths or [1] * len(log_likelihoods), strict=True)]
    return max(range(len(scores)), key=lambda number: scores[number])


def _value(match: re.Match[str]) -> Decimal:
    sign = "-" if match["sign"] else ""
    return Decimal(sign + match["digits"].replace(",", "") + (match["exponent"] or ""))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, str) and isinstance(other, str):
        return one.split() == other.split()
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)
