"""The form of an answer in vLLM's words, as its documentation has them; what a vLLM that is there makes of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from polymerge.engine.structure import Structure, calls_structure, choice_structure, json_structure
from polymerge.engine.vllm.form import GUIDANCE, form_of
from polymerge.errors import ModelError
from tests.tiny import text_tokenizer


def test_a_form_is_one_field_of_structured_outputs() -> None:
    assert form_of(None) == {}
    assert form_of(json_structure({"type": "null"})) == {"structured_outputs": {"json": {"type": "null"}}}
    assert form_of(choice_structure(["a", "b"])) == {"structured_outputs": {"choice": ["a", "b"]}}
    assert form_of(Structure("regex", "a+")) == {"structured_outputs": {"regex": "a+"}}
    assert form_of(Structure("grammar", "start: A")) == {"structured_outputs": {"grammar": "start: A"}}


def test_what_is_no_json_is_refused_by_the_options_name() -> None:
    with pytest.raises(ModelError, match="guided_json: cannot be used: Expecting"):
        form_of(json_structure("{", "guided_json"))


def test_calls_that_may_come_are_structural_tags() -> None:
    said = form_of(calls_structure("<c>\n", {"type": "object"}, "</c>", several=False))["structured_outputs"]
    form = json.loads(said["structural_tag"])["format"]
    assert form["triggers"] == ["<c>"] and form["stop_after_first"] and form["tags"][0]["begin"] == "<c>\n"
    assert form["tags"][0]["content"]["json_schema"] == {"type": "object"}
    assert form_of(calls_structure("", {"type": "object"}, "", several=False)) == {}


def test_where_llguidance_holds_them_json_and_calls_are_the_embedded_engines_grammar() -> None:
    calls, null = calls_structure("<c>\n", {"type": "object"}, "</c>", several=False), json_structure({"type": "null"})
    grammar = form_of(calls, text_tokenizer())["structured_outputs"]["grammar"]
    assert '"<c>"' in grammar and "%json" in grammar
    grammar = form_of(null, text_tokenizer())["structured_outputs"]["grammar"]
    assert grammar.startswith('start: %json {"type": "null"') and "{1,24}" in grammar  # white space has an end
    choice = choice_structure(["a", "b"])
    assert form_of(choice, text_tokenizer()) == form_of(choice)


VALIDATES = """
import json, sys, types
from transformers import AutoTokenizer
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
asked = json.load(open(sys.argv[1]))
tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
config, model = StructuredOutputsConfig(**asked["config"]), types.SimpleNamespace(is_diffusion=False)
told = []
for form in asked["forms"]:
    settings = SamplingParams(structured_outputs=StructuredOutputsParams(**form))
    try:
        settings._validate_structured_outputs(model, config, tokenizer)
        told.append("")
    except Exception as error:
        told.append(str(error))
json.dump(told, open(sys.argv[2], "w"))
"""


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif("POLYMERGE_VLLM_PYTHON" not in os.environ, reason="POLYMERGE_VLLM_PYTHON is not set")
def test_vllm_takes_them_as_it_is_started_here_and_names_what_it_cannot_hold(tmp_path: Path) -> None:
    """Its own check of a request, without a model: a server's start takes minutes."""
    tokenizer = text_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    schema = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"]}
    structures = [
        calls_structure("<tool_call>\n", schema, "\n</tool_call>", several=True),
        calls_structure("", schema, "", several=False),
        calls_structure("<s>", schema, "", several=False),
        json_structure(schema), json_structure(True), choice_structure(["yes", "no way"]),
        Structure("regex", "[0-9]{2}-[ab]x"),
        Structure("grammar", 'root ::= "a" "b"'), Structure("grammar", 'start: "a" "b"'),
        json_structure({"properties": {"a": {"type": "string", "format": "no-such"}}}), Structure("regex", "a("),
    ]  # fmt: skip
    forms = [form_of(structure, tokenizer)["structured_outputs"] for structure in structures]
    asked, told = tmp_path / "asked.json", tmp_path / "told.json"
    asked.write_text(json.dumps({"tokenizer": str(tmp_path / "tokenizer"), "config": GUIDANCE, "forms": forms}))
    command = [os.environ["POLYMERGE_VLLM_PYTHON"], "-c", VALIDATES, str(asked), str(told)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    *taken, odd_format, odd_regex = json.loads(told.read_text())
    assert not any(taken), taken
    assert "no-such" in odd_format and "regex" in odd_regex
