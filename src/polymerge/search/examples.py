"""The held-out requests that a search measures on, and their files. Knows rows; does not know models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..data.schema import ExampleRow, read_all

# The original's distributions are kept in memory, a vocabulary of float32 a token.
LIMIT = 32


@dataclass(frozen=True)
class Example:
    """A held-out request. Compared are the tokens of the answer, or of the prompt where there is none."""

    prompt: str
    answer: str = ""


# expert -> its held-out requests, or the JSONL file that holds them
Prompts: TypeAlias = Mapping[str, str | Path | Sequence[Example]]


def read_prompts(prompts: Prompts, limit: int = LIMIT) -> dict[str, Sequence[Example]]:
    """Every expert's held-out requests. Raises DataError for a file that cannot be used."""
    return {
        name: read_examples(given, limit) if isinstance(given, str | Path) else given for name, given in prompts.items()
    }


def read_examples(file: str | Path, limit: int = LIMIT) -> list[Example]:
    """The first rows of a JSONL file: `prompt`, and `answer` where there is one; other keys are left alone.

    Raises:
        DataError: one line that names the file and the row.
    """
    return [Example(row.prompt, row.answer or "") for row in read_all(ExampleRow, file, limit)]
