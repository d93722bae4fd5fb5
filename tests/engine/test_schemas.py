"""Which schemas would be held inexactly, and which keyword is named; held numbers are judged by `fractions`."""

import json
import time
from fractions import Fraction
from typing import Any

import pytest

from polymerge.engine.grammar import has_form
from polymerge.engine.schemas import blamed, inexact
from polymerge.engine.structure import calls_structure, json_structure
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
        {"minimum": -0.5, "exclusiveMaximum": 0},
        {"exclusiveMinimum": -1.5, "exclusiveMaximum": -1},
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


def test_a_refused_tool_names_the_keyword() -> None:
    pay = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
    with pytest.raises(ModelError, match=r"tools: the keyword pattern \(#/properties/a/pattern\)"):
        has_form(calls_structure("", pay, "", several=False), "{}")


def test_data_and_names_of_properties_are_no_keywords() -> None:
    data = {"exclusiveMinimum": 0, "maximum": 0.1}
    assert inexact({"const": data, "enum": [data], "properties": {"minimum": {"const": 10**22}}}) is None
    assert inexact({"properties": {"a": {"exclusiveMinimum": 0}, "b": {"maximum": 0.1}}}) is None
    assert inexact({"properties": {"a": data}}) == "exclusiveMinimum 0"
    assert blamed({"a": 1, "b": 2}, lambda schema: False) is None
    for name in ("default", "const", "enum", "examples"):  # of a property
        assert inexact({"$defs": {name: {"properties": {name: data}}}}) == "exclusiveMinimum 0"
        schema = {"type": "object", "properties": {name: {"type": "string", "pattern": "(?=a)"}}}
        with pytest.raises(ModelError, match=rf"pattern \(#/properties/{name}/pattern\)"):
            has_form(json_structure(schema), "{}")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"const": 2**53 + 1}, "const 9007199254740993"),
        ({"enum": ["a", 2**53 + 1]}, "enum 9007199254740993"),
        ({"const": {"a": [{"b": -(2**53) - 1}]}}, "const -9007199254740993"),
        ({"enum": [10**400]}, "enum 1000"),
        ({"const": float("inf")}, "const inf"),
        ({"exclusiveMinimum": float("-inf"), "type": "number"}, "exclusiveMinimum -inf"),
        ({"maximum": float("nan"), "type": "number"}, "maximum nan"),
        ({"minimum": 10**400, "type": "number"}, "minimum 1000"),
    ],
)
def test_a_number_that_llguidance_rounds_is_refused(data: dict[str, Any], named: str) -> None:
    for schema in (data, {"properties": {"enum": data}, "type": "object"}):
        with pytest.raises(ModelError, match=f"^response_format: .*{named}"):
            has_form(json_structure(schema, "response_format"), "1")
    assert has_form(json_structure({"enum": [2**60, True, 0.5]}), str(2**60))


HALF, UP_TO_HALF = {"type": "number", "exclusiveMinimum": 0}, {"maximum": 0.5}
BELOW_ZERO, FROM_HALF = {"type": "number", "exclusiveMaximum": 0}, {"minimum": -0.5}


@pytest.mark.parametrize(("one", "other", "named"), [(HALF, UP_TO_HALF, "exclusiveMinimum 0"),
                                                     (BELOW_ZERO, FROM_HALF, "exclusiveMaximum 0")])  # fmt: skip
def test_bounds_are_taken_together_where_they_meet_on_one_value(
    one: dict[str, Any], other: dict[str, Any], named: str
) -> None:
    there = {"$defs": {"x": other}}
    met: list[dict[str, Any]] = [
        one | {"anyOf": [other, {"maximum": 7}]},
        one | {"oneOf": [other]},
        one | {"allOf": [{"anyOf": [{"$ref": "#/$defs/x"}]}]} | there,
        {"allOf": [{"$ref": "#/$defs/x"}, one]} | there,
        one | {"$ref": "#/examples/0", "examples": [other]},
        one | {"$ref": "#/$defs/a~1b%20", "$defs": {"a/b ": other}},
        {"anyOf": [one, {"type": "null"}], "oneOf": [other]},
        {"allOf": [{"properties": {"a": one}}, {"properties": {"a": other}}]},
        {"allOf": [{"properties": {"a": one}}, {"additionalProperties": other}]},
        {"properties": {"a": one}, "patternProperties": {"^a": other}},
        {"allOf": [{"items": one}, {"prefixItems": [True, other]}]},
        {"allOf": [{"$ref": "#/$defs/l"}, {"properties": {"k": {"properties": {"v": other}}}}],
         "$defs": {"l": {"properties": {"k": {"$ref": "#/$defs/l"}, "v": one}}}},
        {"$defs": {"x": {"$anchor": "q"} | other}, "$ref": "#q"} | one,
    ]  # fmt: skip
    assert [inexact(schema) for schema in met] == [named] * len(met)
    apart: list[dict[str, Any]] = [
        {"anyOf": [one, other]},
        {"properties": {"a": one, "b": other, "c": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"allOf": [{}]}}},
        {"properties": {"a": one, "b": {"anyOf": [{"$ref": "#/$defs/x"}, {"type": "null"}]}}} | there,
        {"allOf": [{"properties": {"a": one}}, {"properties": {"b": other}}]},
        {"allOf": [{"prefixItems": [one]}, {"prefixItems": [True, other]}]},
        {"properties": {"a": one}, "additionalProperties": other},
        {"properties": {"a": one, "n": {"$ref": "#"}, "b": other}},
    ]
    assert [inexact(schema) for schema in apart] == [None] * len(apart)


def test_what_is_to_blame_is_not_looked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, tried = [0.0], list[Any]()

    def compiles(schema: Any) -> bool:
        now[0] += 0.2
        tried.append(schema)
        return "z" not in schema

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert blamed(dict.fromkeys("abcdez"), compiles) is None and len(tried) == 3
    assert blamed(dict.fromkeys("az"), compiles) == ("z", "#/z")


def test_a_schema_with_too_many_parts_that_meet_is_judged_as_one_value() -> None:
    def made(*bounds: dict[str, Any]) -> dict[str, Any]:
        return {"allOf": [{"properties": {f"{n}": one}} for n in range(300) for one in bounds]}

    assert inexact(made({"type": "number"})) is None
    assert inexact({"properties": {"a": HALF, "b": UP_TO_HALF, "c": made({})}}) == "exclusiveMinimum 0"


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
