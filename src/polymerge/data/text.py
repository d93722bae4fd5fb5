"""Text that every file, request and tokenizer can take.

Knows that a Python text may hold half a surrogate pair, which no encoding has bytes for; JSON and Python literals can
spell one. Does not know where a text comes from.
"""

from __future__ import annotations


def encodable(text: str) -> str:
    """The text with U+FFFD in the place of every lone surrogate."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
