"""Conformance of /v1/responses: OpenAI's own client creates, streams and parses."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.serve.app import create_app
from polymerge.serve.responses import ResponseRequest
from tests.serve.conftest import Server, running
from tests.tiny import text_model, text_tokenizer


class Order(pydantic.BaseModel):
    item: Literal["stamp", "pen"]
    count: int = pydantic.Field(ge=0, le=9)


PAY: Any = {
    "type": "function", "name": "pay", "strict": True,
    "parameters": {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"],
                   "additionalProperties": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def talking() -> Iterator[Server]:
    tokenizer = text_tokenizer()
    engine = BatchingEngine(HFEngine(text_model(tokenizer), tokenizer, fingerprint="text"))
    with running(create_app(engine), engine) as started:
        yield started
    engine.close(0)


@pytest.fixture
def client(talking: Server) -> openai.OpenAI:
    return talking.client()


def test_an_answer_is_the_chats_own(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="average",
        instructions="Be short.",
        input="Hello?",
        max_output_tokens=12,
        temperature=0,
        metadata={"a": "b"},
    )
    turns: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello?"}]
    chat = client.chat.completions.create(model="average", messages=turns, max_tokens=12, temperature=0)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.input_tokens == chat.usage.prompt_tokens and answer.usage.output_tokens == 12
    assert answer.metadata == {"a": "b"} and answer.store is False
    assert answer.polymerge["expert"] == "average"


def test_a_stream_tells_the_same_in_order(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "average", "input": "Hello?", "max_output_tokens": 12, "temperature": 0}
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.incomplete"]  # fmt: skip
    numbers = [event.sequence_number for event in client.responses.create(**asked, stream=True)]
    assert numbers == list(range(len(numbers)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == client.responses.create(**asked).output_text


def test_parse_gives_the_clients_own_model(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="average", input="An order.", text_format=Order, max_output_tokens=200)
    assert isinstance(answer.output_parsed, Order) and answer.status == "completed"
    with client.responses.stream(
        model="average", input="An order.", text_format=Order, max_output_tokens=200
    ) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Order)


def test_tools_are_called_and_their_results_read(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "average", "tools": [PAY], "max_output_tokens": 200}
    answer = client.responses.create(input="Pay.", tool_choice="required", **asked)
    [call] = answer.output
    assert call.type == "function_call" and json.loads(call.arguments)["sum"] in (1, 2)
    with client.responses.stream(input="Pay.", tool_choice={"type": "function", "name": "pay"}, **asked) as stream:
        kinds = [event.type for event in stream]
        [streamed] = stream.get_final_response().output
    assert "response.function_call_arguments.delta" in kinds and "response.function_call_arguments.done" in kinds
    assert json.loads(streamed.arguments)["sum"] in (1, 2)
    turns: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Pay."}]},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "paid"},
    ]
    client.responses.create(model="average", input=turns, tools=[PAY], max_output_tokens=3)


def test_calls_that_follow_one_another_are_one_turn() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "pay", "arguments": '{"sum": 1}'}
    told = {"type": "function_call_output", "call_id": "1", "output": "paid"}
    items = [{"role": "user", "content": "Pay twice."}, call, call | {"call_id": "2"}, told, told | {"call_id": "2"}]
    chat = ResponseRequest.model_validate({"input": items}).as_chat()
    assert [message.role for message in chat.messages] == ["user", "assistant", "tool", "tool"]
    assert [one.id for one in chat.messages[1].tool_calls or ()] == ["1", "2"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"nonsense": 1}, "nonsense"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"uniqueItems": True}}}}, "text.format"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_what_is_not_held_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.responses.create(model="average", input="Hello?", max_output_tokens=3, extra_body=fields)
    assert refused.value.status_code in (400, 404) and named in (refused.value.param or "")


def test_what_to_send_instead_is_said_in_json() -> None:
    with pytest.raises(ValueError, match="leave it out or send null"):
        ResponseRequest.model_validate({"input": "x", "previous_response_id": "resp_1"})


def test_what_cannot_change_an_answer_is_taken(client: openai.OpenAI) -> None:
    client.responses.create(
        model="average", input="Hello?", max_output_tokens=2, store=True, reasoning={"effort": "low"},
        include=["reasoning.encrypted_content"], prompt_cache_key="k", user="u", service_tier="auto",
        text={"format": {"type": "text"}, "verbosity": "low"}, parallel_tool_calls=True,
    )  # fmt: skip
