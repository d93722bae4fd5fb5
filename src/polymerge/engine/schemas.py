"""JSON schemas before llguidance reads them: what it would hold inexactly, and which keyword it cannot hold.

Knows keywords; does not know tokens or grammars. Numbers are read there as 64-bit floats and integers, so that some
large ones are rounded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from .bounds import LOWER, UPPER, is_number, let_in
from .schema_parts import keyword_at, parts

EXACT = 2**53  # up to here every whole number is a 64-bit float
LARGEST = 2**63 - 1
# How long the keyword that is to blame is looked for.
LONGEST_SEARCH = 0.5  # seconds


def inexact(schema: Any) -> str | None:
    """A keyword that would not be held exactly, with its value; None where there is none."""
    every = list(parts(schema))
    for part in every:
        for key in (*LOWER, *UPPER):
            value: Any = part.get(key)
            if is_number(value) and (_is_endless(value) or _is_rounded(key, value)):
                return f"{key} {value}"
        for key in ("const", "enum"):
            for number in _numbers(part.get(key)):
                if not _is_float(number):
                    return f"{key} {number}"
    return let_in(schema, every)


def blamed(schema: Any, compiles: Callable[[Any], bool]) -> tuple[str, str] | None:
    """The keyword without which a schema could be held, and its place, such as "#/properties/a/pattern"; None where it
    could be held as it is, no single one is to blame, or it takes too long to find.

    Args:
        compiles: whether a schema can be held.
    """
    end = time.monotonic() + LONGEST_SEARCH
    if compiles(schema):
        return None
    path, node = list[str | int](), schema
    while isinstance(node, dict | list) and node:
        keys = sorted(node, key="type".__eq__) if isinstance(node, dict) else range(len(node))
        for key in keys:  # what narrows a type is to blame before the type
            if time.monotonic() > end:
                return None
            if compiles(_without(schema, [*path, key])):
                path.append(key)
                node = node[key]
                break
        else:
            break
    keyword = keyword_at(path)
    return (keyword, "#/" + "/".join(map(str, path))) if keyword else None


def _without(schema: Any, path: list[str | int]) -> Any:
    """A copy that lacks what is at the end of a path."""
    key, *rest = path
    if isinstance(schema, dict):
        return {k: _without(v, rest) if k == key else v for k, v in schema.items() if rest or k != key}
    return [_without(v, rest) if n == key else v for n, v in enumerate(schema) if rest or n != key]


def _numbers(data: Any) -> Iterator[int | float]:
    """In a value of JSON, at any depth."""
    todo = [data]
    while todo:
        value = todo.pop()
        if is_number(value):
            yield value
        elif isinstance(value, list | dict):
            todo += value.values() if isinstance(value, dict) else value


def _is_float(number: float) -> bool:
    """Whether a 64-bit float holds it."""
    if isinstance(number, float):
        return not _is_endless(number)
    try:
        return int(float(number)) == number
    except OverflowError:
        return False


def _is_endless(value: float) -> bool:
    """As Python reads 1e400."""
    return isinstance(value, float) and not math.isfinite(value)


def _is_rounded(key: str, value: float) -> bool:
    if abs(value) < EXACT:
        return False
    past = value if key in LOWER else -value
    if abs(value) > LARGEST:  # taken as the largest there is: none that fits is too large then, but some are too small
        return past > 0
    whole = isinstance(value, float) or value == LARGEST or int(float(value)) == value
    return key.startswith("exclusive") or not whole
