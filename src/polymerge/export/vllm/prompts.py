"""Prompts to measure an export on: a handful of built-in ones, or a file's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...data.rows import place, read_lines
from ...data.schema import ExampleRow, parse_row
from ...errors import DataError

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
class CalibrationPrompt:
    """A prompt to measure on. Without an answer, the expert's own greedy one is used."""

    prompt: str
    answer: str | None = None


def builtin_prompts() -> list[CalibrationPrompt]:
    """A handful of prompts of different kinds."""
    return [CalibrationPrompt(prompt) for prompt in BUILTIN]


def read_prompts(file: str | Path) -> list[CalibrationPrompt]:
    """Prompts from a file: one a line, or JSON lines with `prompt` and perhaps `answer`.

    Raises:
        DataError: no such file, or a line that is neither.
    """
    prompts = [_prompt(line, place(file, number)) for number, line in read_lines(file)]
    if not prompts:
        raise DataError(f"{file}: holds no calibration prompts; write one a line")
    return prompts


def _prompt(line: str, where: str) -> CalibrationPrompt:
    if not line.lstrip().startswith("{"):
        return CalibrationPrompt(line.strip())
    row = parse_row(ExampleRow, line, where)
    return CalibrationPrompt(row.prompt, row.answer or None)
