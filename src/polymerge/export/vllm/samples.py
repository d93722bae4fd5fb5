"""Prompts to measure an export on: a handful of built-in ones, or a file's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...errors import RecipeError

BUILTIN = (
    "What is the capital of Norway, and what is it known for?",
    "Tom has 14 pens and buys 9 more. How many pens does he have?",
    "Write a Python function that reverses a list.",
    "List the files in the folder logs that are larger than 10 MB.",
    "An order for Mia: 3 lamps and 12 candles.",
    "Rewrite this sentence so that it is polite: Send me the report now.",
    "My card was charged twice for the same purchase. What should I do?",
    "Translate to French: The train leaves at seven in the morning.",
)


@dataclass(frozen=True)
class Sample:
    """A prompt to measure on. Without an answer, the expert's own greedy one is used."""

    prompt: str
    answer: str | None = None


def builtin_samples() -> list[Sample]:
    """A handful of prompts of different kinds."""
    return [Sample(prompt) for prompt in BUILTIN]


def read_samples(file: Path) -> list[Sample]:
    """Prompts from a file: one a line, or JSON lines with `prompt` and perhaps `answer`.

    Raises:
        RecipeError: no such file, or a line that is neither.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot read the calibration prompts: {error}") from None
    samples = [_sample(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise RecipeError(f"{file}: holds no calibration prompts; write one a line")
    return samples


def _sample(file: Path, number: int, line: str) -> Sample:
    if not line.lstrip().startswith("{"):
        return Sample(line.strip())
    try:
        row = json.loads(line)
        return Sample(str(row["prompt"]), str(row["answer"]) if row.get("answer") else None)
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"{file}, line {number}: not a JSON object with `prompt`") from None
