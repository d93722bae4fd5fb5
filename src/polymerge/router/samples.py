"""The samples that a router learns from and is measured on: a text and the name of its field.

Knows files; does not know models. `DIR/NAME/train.jsonl`, `validation.jsonl` and `test.jsonl` hold one JSON object a
line with `prompt`; the folder's name is the field.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RouterError

# The field of a text that belongs to no known one; such texts are only measured on, never learned from.
OUTSIDE = "none"


@dataclass(frozen=True)
class Sample:
    """A text with its field, and its reference answer where there is one."""

    text: str
    field: str
    answer: str = ""


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of a JSONL file whose rows have a text `prompt`. Empty lines are passed over.

    Raises:
        RouterError: the file is missing, or a line is not such a row.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _row(file, number, line)
    except UnicodeDecodeError:
        raise RouterError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise RouterError(f"{file}: cannot be read ({error.strerror})") from None


def _row(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RouterError(f"{file}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise RouterError(f'{file}, line {number}: needs an object with a text "prompt"')
    if not row["prompt"].strip():
        raise RouterError(f"{file}, line {number}: the prompt is empty")
    return row


def read_fields(
    folder: Path, split: str, *, fields: Sequence[str] | None = None, limit: int | None = None
) -> list[Sample]:
    """The first `limit` samples of every field's `split`; fields in alphabetical order, or as they are given.

    Fields whose folder has no such split are left out.

    Raises:
        RouterError: the folder is missing, a given field has no folder, or a row is damaged.
    """
    if not folder.is_dir():
        raise RouterError(f"{folder}: no such folder; it holds NAME/train.jsonl for every field")
    missing = [name for name in fields or () if not (folder / name).is_dir()]
    if missing:
        raise RouterError(f"{folder / missing[0]}: no such folder, so there is no field {missing[0]!r}")
    names = fields or sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = []
    for name in names:
        file = folder / name / f"{split}.jsonl"
        for taken, (_, row) in enumerate(read_rows(file) if file.is_file() else ()):
            if taken == limit:
                break
            found.append(Sample(row["prompt"], name, str(row.get("answer", ""))))
    return found


def read_labelled(file: Path, key: str) -> list[Sample]:
    """Rows whose `key` names the field; `none` where no field is right. Raises RouterError for a damaged row."""
    found = []
    for number, row in read_rows(file):
        if not isinstance(row.get(key), str):
            raise RouterError(f'{file}, line {number}: needs a text "{key}" that names the field')
        found.append(Sample(row["prompt"], row[key], str(row.get("answer", ""))))
    return found


def check_training(samples: Sequence[Sample]) -> list[str]:
    """The fields, sorted. Raises RouterError where a classifier cannot learn from these samples."""
    counts = Counter(sample.field for sample in samples)
    fields = sorted(counts)
    if not fields:
        raise RouterError("no training samples; DIR/NAME/train.jsonl holds those of the field NAME")
    if OUTSIDE in counts:
        raise RouterError(f"a field cannot be called {OUTSIDE!r}: that is the name of texts that belong to no field")
    if len(fields) == 1:
        raise RouterError(f"only one field ({fields[0]}) among the training samples; routing needs two or more")
    for name, count in sorted(counts.items()):
        if count < 2:
            raise RouterError(f"field {name!r} has one training sample; give it at least 2")
    return fields
