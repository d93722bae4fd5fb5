"""Where a JSON schema's parts are: which keywords hold schemas, which hold schemas under names, and which hold data.

Knows the structure alone; what the keywords mean for numbers is `polymerge.engine.bounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote

# What a schema holds as data, in which keywords mean nothing.
DATA = frozenset({"const", "enum", "default", "examples", "dependentRequired"})
# Whose keys are names, such as a property's that may be called "enum", and whose values are schemas.
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema in a schema, itself the first, each once; also what a $ref finds in a place that holds none."""
    todo, met = [schema], set[int]()
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += reversed(node)
        elif isinstance(node, dict) and id(node) not in met:
            met.add(id(node))
            yield node
            todo += reversed([*_below(node), target(schema, node.get("$ref"))])


def _below(node: dict[str, Any]) -> Iterator[Any]:
    for key, value in node.items():
        if key in NAMED and isinstance(value, dict):
            yield from value.values()
        elif key not in DATA:
            yield value


def rebuilt(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy in which every schema is what `change` makes of it, those inside of it first; names and data stay."""
    if isinstance(schema, list):
        return [rebuilt(part, change) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            made[key] = {name: rebuilt(part, change) for name, part in value.items()}
        else:
            made[key] = value if key in DATA else rebuilt(value, change)
    return change(made)


def target(schema: Any, reference: Any) -> Any:
    """What a $ref such as "#/$defs/a" refers to; None where it is another document's, or not there."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    node, steps = schema, unquote(reference[1:]).split("/")
    if steps[0]:  # an anchor
        return None
    for step in steps[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(key)
        else:
            inside = isinstance(node, list) and key.isdecimal() and int(key) < len(node)
            node = node[int(key)] if inside else None
    return node


def keyword_at(path: Sequence[str | int]) -> str | None:
    """The last keyword on the way to a place, such as "pattern" for ["properties", "enum", "pattern"]."""
    keyword, holds = None, "schemas"
    for key in path:
        if holds == "data":
            break
        if holds == "names":
            holds = "schemas"
        elif isinstance(key, str):
            keyword, holds = key, "names" if key in NAMED else "data" if key in DATA else "schemas"
    return keyword
