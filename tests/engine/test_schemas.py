"""Which schemas would be held inexactly, and which keyword is named; held numbers are judged by `fractions`."""

import json
from fractions import Fraction
from typing import Any

import pytest

from polymerge.engine.grammar import has_form
from polymerge.engine.schemas import blamed, inexact
from polymerge.engine.structure import json_structure
from polymerge.errors import ModelError

FITS = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": 10**30, "maximum": 10**30 + 5},
        {"minimum": 1e20, "maximum": 2e20},
        {"minimum": 2**53 + 1},
        {"exclusiveMinimum": 2**53},
        {"exclusiveMaximum": 10**16},
        {"maximum": 2**63 - 1, "minimum": 0},
        {"maximum": 2**64 - 1, "minimum": 3},
        {"exclusiveMinimum": 0, "maximum": 0.5},
        {"exclusiveMinimum": 5, "exclusiveMaximum": 5.001},
        {"exclusiveMinimum": 0, "maximum": 1},
        {"minimum": 0, "exclusiveMaximum": 0.001},
        {"exclusiveMinimum": -0.5, "maximum": 0},
    ],
)
def test_a_number_that_is_let_in_is_within_its_bounds(kind: str, bounds: dict[str, Any]) -> None:
    structure = json_structure({"type": kind, **bounds})
    near = [Fraction(str(bound)) + step for bound in bounds.values() for step in (-1, 0, 1, Fraction(1, 1000))]
    tried = [*near, *map(Fraction, (0, 2**63 - 1, -(2**63)))]
    try:
        let_in = [value for value in tried if has_form(structure, _written(value))]
    except ModelError as refused:
        assert any(key in str(refused) for key in bounds), refused
        return
    exact = {key: Fraction(str(bound)) for key, bound in bounds.items()}
    assert all(FITS[key](value, bound) for value in let_in for key, bound in exact.items())


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"{'-' if value < 0 else ''}{abs(value) // 1}.{round(abs(value) % 1 * 10**6):06d}".rstrip("0")


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "properties": {"minimum": {"type": "string", "pattern": "("}}},
         "pattern (#/properties/minimum/pattern)"),
        ({"enum": []}, "enum (#/enum)"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (#/minimum)"),
        ({"$defs": {"n": {"$ref": "http://x/y"}}, "$ref": "#/$defs/n"}, "$ref"),
        ({"properties": {"a": {"format": "zip", "type": "string"}}, "required": ["a"]}, "format (#/properties/a/"),
        ({"allOf": [{"type": "number", "exclusiveMinimum": 0}, {"maximum": 0.1}]}, "exclusiveMinimum"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, '"if", "then"'),
        ({"$ref": "#"}, "$ref (#/$ref)"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "array", "items": {"not": {}}}, '"not"'),
        ({"properties": {"ключ": {"type": "string", "pattern": "(?=a)"}}}, "pattern (#/properties/ключ"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_keyword(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as refused:
        has_form(json_structure(schema, "response_format"), "{}")
    assert str(refused.value).startswith("response_format: ") and named in str(refused.value)


def test_data_and_names_of_properties_are_no_keywords() -> None:
    data = {"exclusiveMinimum": 0, "maximum": 0.1}
    assert inexact({"const": data, "enum": [data], "properties": {"minimum": {"const": 10**30}}}) is None
    assert inexact({"properties": {"a": {"exclusiveMinimum": 0}, "b": {"maximum": 0.1}}}) is None
    assert inexact({"properties": {"a": data}}) == "exclusiveMinimum 0"
    assert blamed({"a": 1, "b": 2}, lambda schema: False) is None


@pytest.mark.parametrize(
    ("schema", "texts", "others"),
    [
        ({"$defs": {"n": {"type": "object", "properties": {"k": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
          "additionalProperties": False}}, "$ref": "#/$defs/n"}, ['{"k": [{}, {"k": []}]}'], ['{"k": [1]}']),
        ({"type": "object", "patternProperties": {"^n": {"type": "integer"}}, "additionalProperties": False},
         ['{"n1": 3}', "{}"], ['{"m": 3}', '{"n": "a"}']),
        ({"allOf": [{"minimum": 3}, {"maximum": 5}, {"type": "integer"}]}, ["3", "5"], ["2", "6", "3.5"]),
        ({"properties": {"naïve \u2028": {"const": 'é"\\'}}, "required": ["naïve \u2028"], "type": "object",
          "additionalProperties": False}, [json.dumps({"naïve \u2028": 'é"\\'}, ensure_ascii=False)], ["{}"]),
        ({"type": "string", "format": "ipv4"}, ['"10.0.0.1"'], ['"10.0.0.300"']),
        ({"enum": [1, "a", None, {"x": [1]}]}, ["null", '{"x": [1]}'], ["2", '"b"']),
    ],
)  # fmt: skip
def test_hard_schemas_are_held(schema: dict[str, Any], texts: list[str], others: list[str]) -> None:
    structure = json_structure(schema)
    assert all(has_form(structure, text) for text in texts)
    assert not any(has_form(structure, text) for text in others)
