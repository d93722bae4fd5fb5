"""What may be wrong with a generated answer that nobody has looked at: empty, cut off, or repeating itself.

Knows texts and how they ended; does not know what was asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Flaw = Literal["empty", "cut", "repeated"]
# A text repeats itself where its end is one phrase, at least so often and over at least so many words.
TIMES, WORDS, LONGEST_PHRASE = 3, 9, 24


def flaw_of(text: str, finish: str) -> Flaw | None:
    """The first that holds: an answer of nothing, one that goes round, one that ran out of tokens or time."""
    if not text.strip():
        return "empty"
    if repeats(text):
        return "repeated"
    return "cut" if finish == "length" else None


def repeats(text: str) -> bool:
    """Whether the end of a text is one phrase over and over."""
    words = text.split()
    for length in range(1, min(LONGEST_PHRASE, len(words) // TIMES) + 1):
        phrase, times = words[-length:], 1
        while words[-length * (times + 1) : -length * times] == phrase:
            times += 1
        if times >= TIMES and times * length >= WORDS:
            return True
    return False


def flaws_of(notes: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, int]]:
    """Generated answers, and how many of them have which flaw."""
    written = [note for note in notes if note.get("index") is None and "failed" not in note]
    return len(written), dict(Counter(note["flaw"] for note in written if note.get("flaw")))


def words_of(written: int, flaws: Mapping[str, int], tokens: int) -> str:
    """One line; empty where there is nothing to warn of."""
    if not flaws:
        return ""
    said = {"empty": "empty", "cut": f"cut off at {tokens} tokens or by the clock", "repeated": "repeating themselves"}
    counts = ", ".join(f"{flaws[flaw]} {words}" for flaw, words in said.items() if flaw in flaws)
    cures = []
    if set(flaws) != {"cut"}:
        cures.append("--chat asks in the experts' own template, --few-shot and --system say the form")
    if "cut" in flaws:
        cures.append("a larger --max-new-tokens or --time-limit lets them end")
    return f"of {written} generated answers: {counts}; {'; '.join(cures)}"
