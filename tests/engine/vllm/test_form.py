"""The form of an answer in vLLM's words, as its documentation has them; no vLLM is asked here."""

import json

from polymerge.engine.base import GenerateRequest
from polymerge.engine.structure import Structure, calls_structure, choice_structure, json_structure
from polymerge.engine.vllm.form import form_of
from polymerge.engine.vllm.reading import settings


def test_a_form_is_one_field_of_structured_outputs() -> None:
    assert form_of(None) == {}
    assert form_of(json_structure({"type": "null"})) == {"structured_outputs": {"json": {"type": "null"}}}
    assert form_of(choice_structure(["a", "b"])) == {"structured_outputs": {"choice": ["a", "b"]}}
    assert form_of(Structure("regex", "a+")) == {"structured_outputs": {"regex": "a+"}}
    assert form_of(Structure("grammar", "start: A")) == {"structured_outputs": {"grammar": "start: A"}}
    asked = GenerateRequest("x", structure=Structure("regex", "a+"))
    assert settings(asked)["structured_outputs"] == {"regex": "a+"} and "structured_outputs" not in settings(
        GenerateRequest("x")
    )


def test_calls_that_may_come_are_structural_tags() -> None:
    said = form_of(calls_structure("<c>\n", {"type": "object"}, "</c>", several=False))["structured_outputs"]
    form = json.loads(said["structural_tag"])["format"]
    assert form["triggers"] == ["<c>"] and form["stop_after_first"] and form["tags"][0]["begin"] == "<c>\n"
    assert form["tags"][0]["content"]["json_schema"] == {"type": "object"}
    assert form_of(calls_structure("", {"type": "object"}, "", several=False)) == {}
