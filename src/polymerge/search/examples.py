"""The held-out requests that a search measures on, and their files. Knows rows; does not know models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..data.schema import ExampleRow, read_all
from ..errors import DataError

# The original's distributions are kept in memory, a vocabulary of float32 a token.
LIMIT = 32


@dataclass(frozen=True)
class Example:
    """A held-out request. Compared are the tokens of the answer, or of the prompt where there is none."""

    prompt: str
    answer: str = ""


# expert -> its held-out requests, or the JSONL file that holds them
Prompts: TypeAlias = Mapping[str, str | Path | Sequence[Example]]


def read_prompts(prompts: Prompts, limit: int | None = None) -> dict[str, Sequence[Example]]:
    """Every expert's held-out requests; of files the first LIMIT rows, where no limit is said.

    Raises:
        DataError: a file that cannot be used, or what is neither a file nor examples.
    """
    if not isinstance(prompts, Mapping):
        raise DataError(
            f"prompts: a {type(prompts).__name__} names no expert; give a mapping of experts to their files"
        )
    rows = LIMIT if limit is None else limit
    if not isinstance(rows, int) or rows < 1:
        raise DataError(f"limit: {rows!r} is no number of rows; give a whole number from 1 on")
    return {
        name: read_examples(given, rows) if isinstance(given, str | Path) else _checked(given, name)
        for name, given in prompts.items()
    }


def _checked(given: Iterable[Example], expert: str) -> list[Example]:
    """Examples at hand, which are read more than once."""
    examples = list(given) if isinstance(given, Iterable) else [given]
    wrong = next((example for example in examples if not isinstance(example, Example)), None)
    if wrong is not None:
        raise DataError(
            f"prompts of {expert!r}: a {type(wrong).__name__} is no example; give a JSONL file, or Examples"
        )
    return examples


def read_examples(file: str | Path, limit: int = LIMIT) -> list[Example]:
    """The first rows of a JSONL file: `prompt`, and `answer` where there is one; other keys are left alone.

    Raises:
        DataError: one line that names the file and the row.
    """
    return [Example(row.prompt, row.answer or "") for row in read_all(ExampleRow, file, limit)]
