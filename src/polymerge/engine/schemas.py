"""JSON schemas before llguidance reads them: what it would hold inexactly, and which keyword it cannot hold.

Knows keywords; does not know tokens or grammars. A number's bounds are read there as 64-bit floats and integers, so
that some large ones are rounded, and an excluded whole number is let in where the other bound is less than one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

# What a schema holds as data, in which keywords mean nothing.
DATA = frozenset({"const", "enum", "default", "examples"})
LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
EXACT = 2**53  # up to here every whole number is a 64-bit float
LARGEST = 2**63 - 1
# Schemas that are tried to find the keyword that is to blame.
MOST_TRIED = 80


def inexact(schema: Any) -> str | None:
    """A keyword that would not be held exactly, with its value; None where there is none."""
    parts = list(_objects(schema))
    for part in parts:
        for key in (*LOWER, *UPPER):
            value: Any = part.get(key)
            if _is_number(value) and _is_rounded(key, value):
                return f"{key} {value}"
    joined = any("allOf" in part or "$ref" in part for part in parts)
    for scope in [parts] if joined else [[part] for part in parts]:
        low = [part["exclusiveMinimum"] for part in scope if _is_number(part.get("exclusiveMinimum"))]
        high = [part[key] for part in scope for key in UPPER if _is_number(part.get(key))]
        for value in low:
            if any(value == math.floor(value) < other < value + 1 for other in high):
                return f"exclusiveMinimum {value}"
    return None


def blamed(schema: Any, compiles: Callable[[Any], bool]) -> tuple[str, str] | None:
    """The keyword without which a schema could be held, and its place, such as "#/properties/a/pattern"; None where no
    single one is to blame.

    Args:
        compiles: whether a schema can be held.
    """
    left, path, node = MOST_TRIED, list[str | int](), schema
    while isinstance(node, dict | list) and node:
        keys = sorted(node, key="type".__eq__) if isinstance(node, dict) else range(len(node))
        for key in keys:  # what narrows a type is to blame before the type
            left -= 1
            if left < 0:
                return None
            if compiles(_without(schema, [*path, key])):
                path.append(key)
                node = node[key]
                break
        else:
            break
    keywords = [str(key) for key, before in zip(path, [None, *path], strict=False) if _is_keyword(key, before)]
    return (keywords[-1], "#/" + "/".join(map(str, path))) if keywords else None


def _is_keyword(key: str | int, before: str | int | None) -> bool:
    return isinstance(key, str) and before not in ("properties", "patternProperties", "$defs", "definitions", "const")


def _without(schema: Any, path: list[str | int]) -> Any:
    """A copy that lacks what is at the end of a path."""
    key, *rest = path
    if isinstance(schema, dict):
        return {k: _without(v, rest) if k == key else v for k, v in schema.items() if rest or k != key}
    return [_without(v, rest) if n == key else v for n, v in enumerate(schema) if rest or n != key]


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key not in DATA:
                yield from _objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _objects(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rounded(key: str, value: float) -> bool:
    if abs(value) < EXACT:
        return False
    past = value if key in LOWER else -value
    if abs(value) > LARGEST:  # taken as the largest there is: none that fits is too large then, but some are too small
        return past > 0
    whole = isinstance(value, float) or value == LARGEST or int(float(value)) == value
    return key.startswith("exclusive") or not whole
