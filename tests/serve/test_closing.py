"""An object that names its properties gets no others, unless that is open on purpose."""

from typing import Any

import pytest

from polymerge.engine.structure import json_structure
from polymerge.serve.closing import closed
from polymerge.serve.structure import Structured

OPEN = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}


def test_an_object_that_names_its_properties_gets_no_others() -> None:
    shut = OPEN | {"additionalProperties": False}
    assert closed(OPEN) == shut
    nested = {"$defs": {"o": OPEN}, "properties": {"x": {"items": {"$ref": "#/$defs/o"}}, "y": {"anyOf": [OPEN]}}}
    assert closed(nested) == {
        "$defs": {"o": shut},
        "properties": {"x": {"items": {"$ref": "#/$defs/o"}}, "y": {"anyOf": [shut]}},
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "open_one",
    [{"type": "object"}, OPEN | {"additionalProperties": True}, OPEN | {"required": ["a", "b"]},
     OPEN | {"minProperties": 2}, OPEN | {"allOf": [OPEN]}, OPEN | {"anyOf": [OPEN]}, {"const": OPEN},
     OPEN | {"required": 5}, OPEN | {"required": [{}]}, {"properties": 3}],
)  # fmt: skip
def test_what_is_open_on_purpose_stays_open(open_one: dict[str, Any]) -> None:
    assert closed(open_one) == open_one


def test_a_response_format_is_closed_and_a_guided_schema_is_taken_as_it_is() -> None:
    asked = Structured.model_validate({"response_format": {"type": "json_schema", "json_schema": {"schema": OPEN}}})
    assert asked.structure == json_structure(OPEN | {"additionalProperties": False}, "response_format")
    assert Structured.model_validate({"guided_json": OPEN}).structure == json_structure(OPEN, "guided_json")
