"""Bounds of numbers that meet on one value, where llguidance lets an excluded whole number in: where the other bound is
less than one away.

Knows which parts of a schema are about the same value: a part's own keywords, those of its allOf, anyOf and oneOf, what
its $ref refers to, and the same property or item of two such parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

from .schema_parts import target

LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
# Pairs of parts that are looked at. Of a schema with more of them all bounds are taken as one value's.
MOST_PAIRS = 20_000

Part = dict[str, Any]


def is_number(value: Any) -> bool:
    """Whether a keyword's value is one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def let_in(schema: Any, parts: Sequence[Part]) -> str | None:
    """An excluded bound, with its value, that would be let in; None where there is none.

    Args:
        parts: all of the schema's. Their bounds are finite.
    """
    meetings = _Meetings(schema)
    if any(_is_elsewhere(schema, part) for part in parts):
        return _slipping(parts, parts)
    for part in parts:
        meetings.add_inside(part)
    for one, other in meetings:
        if slipping := _slipping([one], [other]):
            return slipping
    return _slipping(parts, parts) if meetings.are_too_many else None


def _is_elsewhere(schema: Any, part: Part) -> bool:
    """Whether it is not known here what a part refers to."""
    if part is not schema and any(isinstance(part.get(key), str) for key in ("$id", "id")):
        return True
    return "$ref" in part and target(schema, part["$ref"]) is None


def _slipping(some: Sequence[Part], others: Sequence[Part]) -> str | None:
    for one, other in ((some, others), (others, some)):
        for value in _values(one, LOWER[1:]):
            if any(value == math.floor(value) < bound < value + 1 for bound in _values(other, UPPER)):
                return f"exclusiveMinimum {value}"
        for value in _values(one, UPPER[1:]):
            if any(value == math.floor(value) > bound > value - 1 for bound in _values(other, LOWER)):
                return f"exclusiveMaximum {value}"
    return None


def _values(parts: Sequence[Part], keys: Sequence[str]) -> list[Any]:
    return [part[key] for part in parts for key in keys if is_number(part.get(key))]


class _Meetings:
    """Pairs of parts that are about one value. It grows while it is read: where two meet, their properties do."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._todo: list[tuple[Part, Part]] = []
        self._met: set[tuple[int, int]] = set()
        self._reached: dict[int, list[Part]] = {}
        self._left = MOST_PAIRS

    @property
    def are_too_many(self) -> bool:
        return self._left < 0

    def __iter__(self) -> Iterator[tuple[Part, Part]]:
        while self._todo and not self.are_too_many:
            one, other = self._todo.pop()
            yield one, other
            for a, b in _shared(one, other):
                self._add(self._reach(a), self._reach(b))

    def add_inside(self, part: Part) -> None:
        """A part with itself, and with whatever holds beside it; of an anyOf's members only one does."""
        groups = [[part], *(self._reach(*members) for members in self._beside(part))]
        self._add([part], [part])
        for one, other in combinations(groups, 2):
            self._add(one, other)

    def _add(self, some: list[Part], others: list[Part]) -> None:
        for one, other in product(some, others):
            self._left -= 1
            if self.are_too_many:
                return
            pair = (min(id(one), id(other)), max(id(one), id(other)))
            if pair not in self._met:
                self._met.add(pair)
                self._todo.append((one, other))

    def _beside(self, part: Part) -> Iterator[list[Any]]:
        yield [target(self._schema, part.get("$ref"))]
        for key in ("anyOf", "oneOf"):
            yield _listed(part.get(key))
        for member in _listed(part.get("allOf")):
            yield [member]

    def _reach(self, *parts: Any) -> list[Part]:
        """All that may hold for the value of one of these."""
        if len(parts) == 1 and id(parts[0]) in self._reached:
            return self._reached[id(parts[0])]
        todo, reached = list(parts), dict[int, Part]()
        while todo:
            part = todo.pop()
            if isinstance(part, dict) and id(part) not in reached:
                reached[id(part)] = part
                todo += [member for members in self._beside(part) for member in members]
        if len(parts) == 1 and isinstance(parts[0], dict):
            self._reached[id(parts[0])] = list(reached.values())
        return list(reached.values())


def _shared(one: Part, other: Part) -> Iterator[tuple[Part, Part]]:
    """Schemas of the same property or item of two parts' value, or twice of one part's."""
    if one is other:
        named = [child for child in _children(one) if child[0] in ("properties", "patternProperties")]
        pairs: Iterator[Any] = combinations(named, 2)
    else:
        pairs = product(_children(one), list(_children(other)))
    for (_, step, child), (_, place, another) in pairs:
        if step[0] == place[0] and (step[1] == place[1] or None in (step[1], place[1])):
            yield child, another


def _children(part: Part) -> Iterator[tuple[str, tuple[str, str | int | None], Part]]:
    """Keyword, place and schema; a place without a name or number may be any."""
    for keyword, kind in (("properties", "property"), ("patternProperties", "property")):
        held = part.get(keyword)
        for name, schema in held.items() if isinstance(held, dict) else ():
            if isinstance(schema, dict):
                yield keyword, (kind, name if keyword == "properties" else None), schema
    for keyword, kind in (("additionalProperties", "property"), ("items", "item"), ("additionalItems", "item")):
        if isinstance(part.get(keyword), dict):
            yield keyword, (kind, None), part[keyword]
    for keyword in ("prefixItems", "items"):
        for number, schema in enumerate(_listed(part.get(keyword))):
            if isinstance(schema, dict):
                yield keyword, ("item", number), schema


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
