r"""The one reader of JSONL: rows as they stand in a file, each with the number of its line.

A line ends with \n and with nothing else: a text may hold U+2028, U+0085 and their like. A \r before the end, a byte
order mark and blank lines are passed over. A row is an object of strict JSON (RFC 8259): no NaN, no name twice, no half
of a surrogate pair, which no tokenizer takes. Knows files and JSON; does not know what a row means
(`polymerge.data.schema`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DataError

BOM = b"\xef\xbb\xbf"


def read_rows(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a JSONL file, one after the other; lines count from 1.

    Raises:
        DataError: one line, with the file, the line and what is wrong.
    """
    with _opened(file) as lines:
        yield from rows_of(lines, file)


def read_lines(file: str | Path) -> Iterator[tuple[int, str]]:
    """(line, text) of a file, for those that hold other lines than JSON too. Raises DataError as `read_rows` does."""
    with _opened(file) as lines:
        yield from lines_of(lines, file)


def read_whole_rows(file: str | Path) -> list[dict[str, Any]]:
    """The rows of a journal of one's own making, up to the first that is not whole: a run that was killed may leave
    half a last line. Whatever `json.dumps` writes is taken, NaN too.

    Raises:
        DataError: the file cannot be read.
    """
    rows: list[dict[str, Any]] = []
    with _opened(file) as lines:
        for line in lines:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
    return rows


def rows_of(lines: Iterable[bytes], name: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_rows` of lines that were read already; `name` stands for the file in errors."""
    for number, text in lines_of(lines, name):
        try:
            yield number, parse_object(text)
        except ValueError as error:
            raise DataError(f"{place(name, number)}: {error}") from None


def lines_of(lines: Iterable[bytes], name: str | Path) -> Iterator[tuple[int, str]]:
    """`read_lines` of lines that were read already."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(f"{place(name, number)}: not UTF-8 text; save the file as UTF-8") from None


def parse_object(text: str) -> dict[str, Any]:
    """An object of strict JSON.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object: {error.msg} (column {error.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise ValueError("not a JSON object: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object; a row looks like {...}")
    return value


def place(file: str | Path, line: int) -> str:
    """How errors name a line of a file."""
    return f"{file}, line {line}"


def content_hash(file: Path) -> str:
    """SHA-256 of a file. Raises DataError where it cannot be read."""
    with _opened(file) as lines:
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line)
    return digest.hexdigest()


def files_by_name(folder: Path, split: str = "test") -> dict[str, Path]:
    """NAME -> NAME/`split`.jsonl, in the order of the names. Raises DataError where there is none."""
    files = {file.parent.name: file for file in sorted(folder.glob(f"*/{split}.jsonl"))}
    if not files:
        raise DataError(f"{folder}: holds no NAME/{split}.jsonl")
    return files


@contextmanager
def _opened(file: str | Path) -> Iterator[Iterable[bytes]]:
    r"""The file's lines in bytes, which end with \n alone."""
    try:
        with Path(file).expanduser().open("rb") as lines:
            yield lines
    except (OSError, ValueError) as error:  # a ValueError: a name with a zero byte
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {double!r} stands twice in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null")
