"""Conformance of forms: OpenAI's own client, and vLLM's fields, against the server."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.serve.app import create_app
from tests.serve.conftest import ScriptedPipeline, Server, running
from tests.tiny import text_model, text_tokenizer

HELLO: list[Any] = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def talking() -> Iterator[Server]:
    """A random model that can write every text."""
    tokenizer = text_tokenizer()
    engine = BatchingEngine(HFEngine(text_model(tokenizer), tokenizer, fingerprint="text"))
    with running(create_app(engine, None, ScriptedPipeline()), engine) as started:
        yield started
    engine.close(0)


@pytest.fixture
def client(talking: Server) -> openai.OpenAI:
    return talking.client()


class Order(pydantic.BaseModel):
    item: Literal["stamp", "pen"]
    count: int = pydantic.Field(ge=0, le=9)
    express: bool | None


def test_parse_gives_the_clients_own_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="average", messages=HELLO, response_format=Order, max_tokens=200, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Order)
    assert answer.choices[0].finish_reason == "stop"


def test_a_streamed_answer_has_the_form_too(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="average", messages=HELLO, response_format=Order, max_tokens=200, seed=1
    ) as stream:
        for _ in stream:
            pass
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Order)


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "a|b"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"regex": "x{2}"}}, "xx"),
        ({"structured_outputs": {"json": {"const": 1}}}, "1"),
        ({"structured_outputs": {"grammar": "start: /[ab]/"}}, "a|b"),
    ],
)
def test_vllms_fields_hold_chats_and_plain_completions(client: openai.OpenAI, fields: Any, form: str) -> None:
    chat = client.chat.completions.create(model="average", messages=HELLO, max_tokens=50, extra_body=fields)
    assert re.fullmatch(form, chat.choices[0].message.content or "")
    plain = client.completions.create(model="average", prompt=["x", "y"], max_tokens=50, n=2, extra_body=fields)
    assert all(re.fullmatch(form, choice.text) for choice in plain.choices) and len(plain.choices) == 4


def test_a_json_object_and_text(client: openai.OpenAI) -> None:
    answers = client.chat.completions.create(
        model="average", messages=HELLO, response_format={"type": "json_object"}, max_tokens=400, n=4, seed=3
    )
    whole = [c.message.content or "" for c in answers.choices if c.finish_reason == "stop"]
    assert whole and all(isinstance(json.loads(text), dict) for text in whole)
    client.chat.completions.create(model="average", messages=HELLO, response_format={"type": "text"}, max_tokens=2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, ("guided_json", "uniqueItems")),
        ({"guided_regex": "("}, ("guided_regex", "unclosed")),
        ({"guided_choice": []}, ("guided_choice", "1 item")),
        ({"guided_choice": ["a"], "guided_regex": "a"}, ("guided_", "one form")),
        ({"response_format": {"type": "json_schema"}}, ("response_format", "json_schema")),
        ({"response_format": {"type": "xml"}}, ("response_format.type", "json_object")),
        ({"structured_outputs": {"disable_any_whitespace": True}}, ("structured_outputs", "disable_any_whitespace")),
        ({"guided_regex": "a", "ignore_eos": True}, ("ignore_eos", "guided_regex")),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(client: openai.OpenAI, fields: Any, named: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="average", messages=HELLO, max_tokens=5, extra_body=fields)
    param, word = named
    assert word in refused.value.message
    assert (refused.value.param or "").startswith(param.rstrip("_")) or param in refused.value.message


def test_the_stages_are_told_the_form(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="staged", messages=HELLO, extra_body={"guided_choice": ["a"]})
    assert answer.choices[0].message.content
