"""Every answer that its budget did not cut has its form; what cannot be held is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from polymerge.engine import grammar
from polymerge.engine.base import GenerateRequest
from polymerge.engine.grammar import Grammars, has_form
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.structure import (
    Structure,
    asked_structure,
    calls_structure,
    choice_structure,
    json_object,
    json_structure,
)
from polymerge.errors import ModelError
from tests.tiny import text_model, text_tokenizer

SHORT: dict[str, Any] = {"type": "string", "maxLength": 4}
SCHEMAS: list[Any] = [
    True,
    SHORT,
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 99},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", 3, None, {"a": [1]}]},
    {"const": {"kind": "x", "n": 1}},
    {"type": ["integer", "null"], "maximum": 9, "minimum": 0},
    {"type": "string", "pattern": "^[a-c]{2,3}-\\d$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "array", "items": SHORT, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": [1, 2]}], "items": False, "minItems": 2},
    {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "maxItems": 2},
    {"type": "object", "properties": {"a": SHORT, "b": {"type": "boolean"}}, "required": ["a", "b"]},
    {"type": "object", "properties": {"a": SHORT}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "patternProperties": {"^x[ab]$": {"type": "null"}}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
    {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": {"enum": [0]}},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    {"oneOf": [{"const": "a"}, {"const": "b"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"$defs": {"c": {"enum": ["r", "g"]}}, "type": "array", "items": {"$ref": "#/$defs/c"}, "maxItems": 2},
    {
        "$defs": {"n": {"type": "object", "properties": {"k": {"type": "array", "items": {"$ref": "#/$defs/n"},
         "maxItems": 1}}, "required": ["k"], "additionalProperties": False}},
        "$ref": "#/$defs/n",
    },
    {
        "type": "object", "required": ["who", "when"], "additionalProperties": False,
        "properties": {
            "who": {"type": "object", "properties": {"name": SHORT}, "required": ["name"],
                    "additionalProperties": False},
            "when": {"type": "string", "format": "time"},
        },
    },
]  # fmt: skip
HELD = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "contains": {"type": "array", "contains": {"const": 1}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 2}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "a"}},
    "oneOf": {"oneOf": [{"type": "string"}, {"minLength": 2}]},
    "format: zip": {"type": "string", "format": "zip"},
    "http://elsewhere/x": {"$ref": "http://elsewhere/x"},
    "false": False,
    "regex": {"type": "string", "pattern": "("},
}


@pytest.fixture(scope="module")
def engine() -> HFEngine:
    tokenizer = text_tokenizer()
    return HFEngine(text_model(tokenizer), tokenizer, fingerprint="text")


def asked(structure: Structure | None, tokens: int = 400, seed: int = 0, **more: Any) -> GenerateRequest:
    return GenerateRequest("Say it. ", None, tokens, 1.0, seed=seed, structure=structure, **more)


def texts(engine: Any, structure: Structure, count: int = 8, tokens: int = 400) -> list[str]:
    answers = engine.generate([asked(structure, tokens, seed) for seed in range(count)])
    whole = [answer.text for answer in answers if answer.finish == "stop"]
    assert whole, "all were cut"
    return whole


def test_answers_are_valid_by_the_jsonschema_package_whoever_runs_beside_them(engine: HFEngine) -> None:
    structures = [json_structure(schema) for schema in SCHEMAS for _ in range(3)]
    answers = engine.generate([asked(structure, 400, seed) for seed, structure in enumerate(structures)])
    whole = 0
    for number, answer in enumerate(answers):
        schema = SCHEMAS[number // 3]
        if answer.finish == "stop":
            whole += 1
            kind = jsonschema.Draft202012Validator
            kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(answer.text))
    assert whole > 0.8 * len(answers)


@pytest.mark.parametrize("word", HELD)
def test_what_cannot_be_held_exactly_is_refused_by_name(engine: HFEngine, word: str) -> None:
    with pytest.raises(ModelError, match=f"^response_format: .*{word}"):
        engine.generate([asked(json_structure(HELD[word], "response_format"))])


def test_a_schema_cannot_turn_the_strictness_off(engine: HFEngine) -> None:
    lenient = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(ModelError, match="uniqueItems"):
        engine.generate([asked(json_structure(lenient))])


def test_any_object_is_an_object(engine: HFEngine) -> None:
    assert all(isinstance(json.loads(text), dict) for text in texts(engine, json_object(), 24))


def test_one_of_the_choices_also_where_one_begins_another(engine: HFEngine) -> None:
    choices = ["a", "ab", 'quo"te', "ä\n"]
    assert set(texts(engine, choice_structure(choices), 40)) == set(choices)


def test_a_regular_expression_and_grammars_of_both_kinds(engine: HFEngine) -> None:
    assert all(re.fullmatch(r"\d{2}-[xy]", text) for text in texts(engine, Structure("regex", r"\d{2}-[xy]")))
    lark = Structure("grammar", 'start: "<" WORD ">"\nWORD: /[ab]{1,3}/')
    assert all(re.fullmatch("<[ab]{1,3}>", text) for text in texts(engine, lark))
    gbnf = Structure("grammar", 'root ::= item ("," item)?\nitem ::= [0-9] | "none"')
    assert all(re.fullmatch(r"(\d|none)(,(\d|none))?", text) for text in texts(engine, gbnf))


@pytest.mark.parametrize("kind", ["regex", "grammar"])
def test_what_means_nothing_is_refused(engine: HFEngine, kind: Any) -> None:
    with pytest.raises(ModelError, match=rf"^guided_{kind}: .*"):
        engine.generate([asked(Structure(kind, "(", f"guided_{kind}"))])


def test_rows_without_a_form_answer_as_alone(engine: HFEngine) -> None:
    free = GenerateRequest("Say it. ", None, 20)
    [alone] = engine.generate([free])
    beside = engine.generate([asked(json_object()), free, asked(choice_structure(["x", "y"]))])
    assert beside[1] == alone and beside[2].text in ("x", "y")


def test_the_likeliest_token_is_that_of_those_allowed(engine: HFEngine) -> None:
    """Oracle: the choice's tokens one by one, the likeliest allowed letter each time, by the scores themselves."""
    choices = ["ad", "bc", "cz"]
    [answer] = engine.generate([GenerateRequest("Say it. ", None, 5, structure=choice_structure(choices))])
    from polymerge.engine.base import ScoreRequest

    firsts = engine.loglikelihood([ScoreRequest("Say it. ", choice[0]) for choice in choices])
    assert answer.text == choices[max(range(3), key=lambda n: firsts[n].log_likelihood)]
    assert answer.tokens == 2  # it ends where the form is whole, without a token that says so


def test_a_form_ends_an_answer_so_its_end_cannot_be_ignored() -> None:
    with pytest.raises(ModelError, match="ignore_eos"):
        asked(json_object(), ignore_eos=True)


def test_the_running_batch_holds_forms_too(engine: HFEngine) -> None:
    running = BatchingEngine(engine)
    try:
        assert all(json.loads(text) in (True, False) for text in texts(running, json_structure({"type": "boolean"})))
        with pytest.raises(ModelError, match="uniqueItems"):
            running.generate([asked(json_structure(HELD["uniqueItems"]))])
    finally:
        running.close(5)


def test_calls_are_held_to_their_schema_where_they_begin(engine: HFEngine) -> None:
    schema = {"type": "object", "properties": {"name": {"const": "f"}}, "required": ["name"],
              "additionalProperties": False}  # fmt: skip
    structure = calls_structure("<c>\n", schema, "\n</c>", several=False)
    matcher = engine.grammars.matcher(structure, engine.voices.average)
    assert matcher is not None
    for token in engine.encode('fine <c>\n{"name": "f"}\n</c>', special=False):
        assert matcher.take(token)
    other = engine.grammars.matcher(structure, engine.voices.average)
    assert other is not None
    taken = [other.take(token) for token in engine.encode('<c>\n{"name": "g', special=False)]
    assert taken[-1] is False and all(taken[:-1])


@pytest.mark.parametrize(("spaces", "fits"), [(0, True), (24, True), (25, False)])
def test_white_space_between_two_signs_has_an_end(spaces: int, fits: bool) -> None:
    assert has_form(json_structure({"type": "array", "items": {"type": "integer"}}), f"[1,{' ' * spaces}2]") is fits


def test_a_tokenizer_without_bytes_is_refused() -> None:
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    engine = HFEngine(text_model(tokenizer), tokenizer, fingerprint="words")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"^json_object: cannot be used: the model's tokenizer spells no bytes"):
            engine.generate([GenerateRequest("w3", None, 5, structure=json_object())])


def test_a_refusal_is_worked_out_once_and_nobody_waits_for_it(
    engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, average, looked = Grammars(engine.grammars._vocabulary), engine.voices.average, list[Any]()

    def look(schema: Any, compiles: Any) -> None:
        looked.append(schema)
        assert not grammars._lock.locked()  # other requests get theirs meanwhile

    monkeypatch.setattr(grammar, "blamed", look)
    said = set[str]()
    for _ in range(3):
        with pytest.raises(ModelError) as refused:
            grammars.matcher(json_structure({"type": "string", "pattern": "("}), average)
        said.add(str(refused.value))
    assert len(looked) == len(said) == 1 and said.pop().startswith("json_schema: cannot be used: ")


def test_a_schema_that_could_be_held_is_not_to_blame() -> None:
    assert str(grammar._refused(json_structure(SHORT, "x"), "too many tokens")) == "x: cannot be used: too many tokens"


def test_the_commands_options_are_one_form_or_one_line(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "null"}')
    for given in (file, str(file), '{"type": "null"}', {"type": "null"}):
        structure = asked_structure(json_schema=given)
        assert structure == json_structure({"type": "null"}, "--json-schema")
    assert asked_structure() is None
    with pytest.raises(ModelError, match="leaves no answer to choose from"):
        asked_structure(choice=[])
    with pytest.raises(ModelError, match="--regex: not together with --json-object"):
        asked_structure(json_object=True, regex="a")
    with pytest.raises(ModelError, match=r"--json-schema: .*none\.json: cannot be read"):
        asked_structure(json_schema=tmp_path / "none.json")
