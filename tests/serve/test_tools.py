"""Tools: calls of the common formats are read from whole answers and from streams, and a client's own loop closes."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.serve.app import create_app
from polymerge.serve.calling import HERMES, LLAMA, MISTRAL, PLAIN, Format, format_of, moved, told_tools
from polymerge.serve.calls import CallReader, whole_calls
from polymerge.serve.schema import ChatMessage
from polymerge.serve.tools import Tool
from tests.serve.conftest import Server, running
from tests.tiny import text_model, text_tokenizer

HELLO: list[Any] = [{"role": "user", "content": "Weather in Bern?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"unit": {"$ref": "#/$defs/Unit"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["unit", "days"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["C", "F"]}},
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "x", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
ARGUMENTS = {"unit": "C", "days": 3, "note": 'a "quoted\\" } brace'}
NAMES = {"weather", "clock"}


def hermes(name: str = "weather", arguments: Any = ARGUMENTS) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


ANSWERS: list[tuple[Format, str, str, list[tuple[str, Any]]]] = [
    (HERMES, "Let me see.\n" + hermes(), "Let me see.", [("weather", ARGUMENTS)]),
    (HERMES, hermes() + "\n" + hermes("clock", {}), "", [("weather", ARGUMENTS), ("clock", {})]),
    (HERMES, "no <tool> here, 1 < 2", "no <tool> here, 1 < 2", []),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "clock"}</tool_call>', "", [("clock", {"a": 1})]),
    (HERMES, hermes("other"), hermes("other"), []),
    (HERMES, '<tool_call>\n{"name": "weather", "argu', '<tool_call>\n{"name": "weather", "argu', []),
    (LLAMA, json.dumps({"name": "weather", "parameters": ARGUMENTS}), "", [("weather", ARGUMENTS)]),
    (LLAMA, '<|python_tag|>{"name": "clock", "parameters": {}}', "", [("clock", {})]),
    (
        LLAMA, '{"name": "clock", "parameters": {}}; {"name": "weather", "parameters": {"days": 1}}', "",
        [("clock", {}), ("weather", {"days": 1})],
    ),
    (LLAMA, '{"temperature": 3}', '{"temperature": 3}', []),
    (LLAMA, "It is warm {really}.", "It is warm {really}.", []),
    (
        MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"d": [1]}}, {"name": "clock", "arguments": {}}]', "",
        [("weather", {"d": [1]}), ("clock", {})],
    ),
    (MISTRAL, "It is [warm].", "It is [warm].", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "shown", "calls"), ANSWERS)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_calls_are_read_whatever_the_pieces(form: Format, text: str, shown: str, calls: Any, step: int) -> None:
    reader, told, read = CallReader(form, NAMES), "", dict[int, list[str]]()
    for start in [*range(0, len(text), step), None]:
        more, pieces = reader.finish() if start is None else reader.push(text[start : start + step])
        told += more
        for piece in pieces:
            if piece.name is not None:
                assert piece.id
                read[piece.number] = [piece.name, ""]
            read[piece.number][1] += piece.arguments
    assert told == shown
    assert [(name, json.loads(arguments)) for name, arguments in read.values()] == calls


def test_a_call_that_the_prompt_began_is_read_from_its_inside() -> None:
    text, calls = whole_calls(CallReader(HERMES, NAMES, inside=True), '{"name": "clock", "arguments": {}}')
    assert not text and [(call.name, call.arguments) for call in calls] == [("clock", "{}")]


def test_the_format_is_told_by_the_template() -> None:
    assert format_of(None) == format_of("{{ messages }}") == PLAIN
    assert format_of("{% if tools %}<tool_call>{% endif %}") == HERMES
    assert format_of("{% for t in tools %}[TOOL_CALLS] [{{ t }}]{% endfor %}") == MISTRAL
    assert format_of('{% if tools %}{"name": x, "parameters": y}{% endif %}') == LLAMA


def test_a_template_that_knows_no_tools_reads_them_as_text() -> None:
    call = {"function": {"name": "clock", "arguments": {}}}
    turns: list[Any] = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
    ]
    system, user, assistant, tool = told_tools(turns, [Tool.model_validate(CLOCK)])
    assert "clock" in system["content"] and "<tool_call>" in system["content"] and user == turns[0]
    assert assistant["content"] == hermes("clock", {}) and "tool_calls" not in assistant
    assert tool == {"role": "user", "content": "<tool_response>\n12:00\n</tool_response>"}


def test_a_call_in_the_older_form_reaches_the_template_as_one_of_today() -> None:
    said = {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": '{"zone": "CET"}'}}
    turn = ChatMessage.model_validate(said).for_template()
    assert turn["tool_calls"] == [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}]
    with pytest.raises(ValueError, match="function_call: only the assistant"):
        ChatMessage.model_validate({**said, "role": "user"})


def test_what_a_schema_refers_to_moves_with_it() -> None:
    schema = {"anyOf": [moved(PARAMETERS, "#/anyOf/0")]}
    jsonschema.validate({"unit": "C", "days": 2}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"unit": "K", "days": 2}, schema)


def test_a_property_may_be_called_as_a_keyword_is() -> None:
    unit = {"$ref": "#/$defs/enum"}
    names = ("default", "const", "enum", "examples")
    schema = {"properties": dict.fromkeys(names, unit), "$defs": {"enum": {"const": unit}}}
    put = moved(schema, "#/items")
    assert put["properties"] == {name: {"$ref": "#/items/$defs/enum"} for name in names}
    assert put["$defs"] == schema["$defs"]  # data refers to nothing


TEMPLATES = {
    "none": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "hermes": "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}\n{% endfor %}",
    "llama": '{% for t in tools %}{{ t | tojson }}{% endfor %}{# "parameters" #}{"name": , "parameters": }'
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    "mistral": "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m['content'] }}"
    "{% if m['tool_calls'] %}[TOOL_CALLS] [{{ m['tool_calls'] | tojson }}]{% endif %}{% endfor %}",
}


@pytest.fixture(scope="module", params=TEMPLATES)
def served(request: pytest.FixtureRequest) -> Iterator[Server]:
    tokenizer = text_tokenizer()
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    engine = BatchingEngine(HFEngine(text_model(tokenizer), tokenizer, fingerprint="text"))
    with running(create_app(engine), engine) as started:
        yield started
    engine.close(0)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_has_valid_arguments(served: Server, choice: Any) -> None:
    client = served.client()
    asked: dict[str, Any] = {
        "model": "average", "messages": HELLO, "tools": [WEATHER, CLOCK], "tool_choice": choice, "max_tokens": 300,
        "parallel_tool_calls": False, "seed": 5,
    }  # fmt: skip
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name in NAMES and call.id
    if call.function.name == "weather":
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.name == call.function.name
    assert json.loads(streamed.message.tool_calls[0].function.arguments) == json.loads(call.function.arguments)
    # and the loop closes
    turns = [*HELLO, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    client.chat.completions.create(model="average", messages=turns, tools=[WEATHER, CLOCK], max_tokens=3)


def test_an_answer_that_need_not_call_is_text(served: Server) -> None:
    for choice in ("auto", "none"):
        answer = served.client().chat.completions.create(
            model="average", messages=HELLO, tools=[WEATHER], tool_choice=choice, max_tokens=8
        )
        assert answer.choices[0].message.content is not None and not answer.choices[0].message.tool_calls


def test_wrong_tools_are_refused_by_name(served: Server) -> None:
    client = served.client()
    named = {"type": "function", "function": {"name": "other"}}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tools": [WEATHER, WEATHER]}, "same name"),
        ({"tools": [WEATHER], "tool_choice": named}, "other"),
        ({"tool_choice": "required"}, "tools is empty"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "not together with tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
             "tool_choice": "required"},
            "not",
        ),
    ]  # fmt: skip
    for fields, words in wrong:
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(model="average", messages=HELLO, max_tokens=5, extra_body=fields)
