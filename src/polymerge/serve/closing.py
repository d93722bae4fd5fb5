"""What a client leaves open in its schema: an object that names its properties gets no others, unless it says so.

Clients call functions by them and make classes of them, and a weak model would go on inventing some. What fits the
closed schema fits the own one. Knows keywords; not how an answer is held to them.
"""

from __future__ import annotations

from typing import Any

from ..engine.schema_parts import parts, rebuilt

# Where one of these stands, the properties of an object may be named in several places.
COMBINING = frozenset(
    {"allOf", "oneOf", "not", "if", "dependentSchemas", "dependencies", "unevaluatedProperties", "$dynamicRef"}
)


def closed(schema: Any) -> Any:
    """The schema, in which an object that names its properties has no others. Unchanged where it puts objects together
    of several parts."""
    for part in parts(schema):
        if COMBINING & part.keys() or ("properties" in part and {"anyOf", "$ref"} & part.keys()):
            return schema
    return rebuilt(schema, _closed)


def _closed(part: dict[str, Any]) -> dict[str, Any]:
    whole = _suffices(part.get("properties"), part.get("required", [])) and "minProperties" not in part
    return {**part, "additionalProperties": part.get("additionalProperties", False)} if whole else part


def _suffices(named: Any, required: Any) -> bool:
    """Whether the named properties are all that an object must have."""
    lists = isinstance(named, dict) and isinstance(required, list)
    return lists and all(isinstance(name, str) and name in named for name in required)
