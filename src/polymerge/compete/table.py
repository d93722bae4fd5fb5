"""The competition's files. In: id, input, eval_type, answer_choices and, for validation data, target. Out: id,
prediction, dummy_field.

Knows what a row may hold and says of every bad one where it stands and why. Does not know how rows are answered.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.text import encodable
from ..errors import DataError

REQUIRED = ("id", "input", "eval_type", "answer_choices")
KINDS = ("multiple_choice", "generation")
# What pandas, with which the kit reads its files, takes for an empty cell of answer_choices.
EMPTY = frozenset({"", "nan", "NaN", "None", "null", "[]"})
LONGEST_CHOICES, MOST_CHOICES = 200_000, 1000  # characters of the cell, choices in it


@dataclass(frozen=True)
class CompetitionRow:
    """One row. `choices` is () for free text, `target` None where the file, or the row's cell, has none."""

    line: int
    id: str
    text: str
    choices: tuple[str, ...] = ()
    target: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be answered: where it begins, its id and the reason."""

    line: int
    id: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line} (id {self.id or '?'}): {self.reason}"


@dataclass(frozen=True)
class Table:
    """A file's rows in their order, good and bad, and the SHA-256 of its bytes."""

    rows: tuple[CompetitionRow | BadRow, ...]
    sha256: str

    @property
    def good(self) -> list[CompetitionRow]:
        return [row for row in self.rows if isinstance(row, CompetitionRow)]

    @property
    def bad(self) -> list[BadRow]:
        return [row for row in self.rows if isinstance(row, BadRow)]


def read_table(path: str | Path, *, limit: int | None = None) -> Table:
    """Reads a file of the competition.

    Raises:
        DataError: the file cannot be read or lacks a column. A bad row is no error here.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    rows: list[CompetitionRow | BadRow] = []
    for line, cells in _records(path, text):
        if limit is not None and len(rows) >= limit:
            break
        rows.append(_row(line, cells))
    return Table(tuple(rows), hashlib.sha256(data).hexdigest())


def parse_choices(text: str) -> tuple[str, ...]:
    """The choices in a cell, a Python list as text; () where there are none. Nothing in it is run.

    Raises:
        ValueError: not a list of texts or numbers, or beyond all measure.
    """
    if text.strip() in EMPTY:
        return ()
    if len(text) > LONGEST_CHOICES:
        raise ValueError(f"answer_choices has {len(text)} characters, at most {LONGEST_CHOICES} are read")
    try:
        choices = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("answer_choices is not a Python list") from None
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str | int | float) for choice in choices):
        raise ValueError("answer_choices is not a list of texts")
    if len(choices) > MOST_CHOICES:
        raise ValueError(f"answer_choices has {len(choices)} choices, at most {MOST_CHOICES} are read")
    if not all(str(choice) for choice in choices):
        raise ValueError("one of answer_choices is empty")
    return tuple(encodable(str(choice)) for choice in choices)


def submission(predictions: Sequence[tuple[str, str]]) -> bytes:
    """The submission's bytes from (id, prediction) pairs, as the kit's `DataFrame.to_csv(index=False)` writes them."""
    rows = [("id", "prediction", "dummy_field"), *((number, prediction, 0) for number, prediction in predictions)]
    return encodable("".join(map(_line, rows))).encode()


def _line(cells: Sequence[object]) -> str:
    """A line of CSV that ends with a line feed. The writer quotes what stands in its own line end only, and a bare
    carriage return would end the row for pandas."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue().removesuffix("\r\n") + "\n"


def _records(path: Path, text: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(line, cells) of every row. Raises DataError for a file that is not such a table."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: not valid CSV: {error}") from None
        if header is None:
            header = [name.strip() for name in cells]
            missing = [name for name in REQUIRED if name not in header]
            if missing:
                raise DataError(
                    f"{path}: has no column {missing[0]}; a file of the competition has {', '.join(REQUIRED)}"
                )
        elif cells:
            padded: list[str | None] = [*cells, *[None] * (len(header) - len(cells))]
            yield line, dict(zip(header, padded, strict=False))
    if header is None:
        raise DataError(f"{path}: is empty; a file of the competition has the columns {', '.join(REQUIRED)}")


def _row(line: int, cells: dict[str, str | None]) -> CompetitionRow | BadRow:
    number = (cells["id"] or "").strip()
    kind, text = (cells["eval_type"] or "").strip(), cells["input"] or ""
    if any(cells[name] is None for name in ("input", "eval_type")):
        return BadRow(line, number, "the row has too few columns")
    if not number:
        return BadRow(line, number, "has no id")
    if not text.strip():
        return BadRow(line, number, "has no input")
    if kind not in KINDS:
        return BadRow(line, number, f"eval_type is {kind[:40]!r}; known are {' and '.join(KINDS)}")
    try:
        choices = parse_choices(cells["answer_choices"] or "") if kind == "multiple_choice" else ()
    except ValueError as error:
        return BadRow(line, number, str(error))
    if kind == "multiple_choice" and not choices:
        return BadRow(line, number, "is multiple_choice and has no answer_choices")
    target = cells.get("target")
    return CompetitionRow(line, number, text, choices, target if target and target.strip() else None)
