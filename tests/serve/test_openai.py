"""Conformance: OpenAI's own client against every endpoint and option."""

import json
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from polymerge.engine import GenerateRequest
from tests.serve.conftest import KEY, Server

HELLO: list[Any] = [{"role": "user", "content": "w10 w20 w21"}]


def offline(server: Server, text: str, expert: Any, tokens: int) -> str:
    ids = server.engine.chat_prompt([{"role": "user", "content": text}])
    answer: str = server.engine.generate([GenerateRequest(ids, expert, tokens)])[0].text
    return answer


def test_models_are_the_router_the_experts_the_average_and_the_stages(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["auto", "e0", "e1", "e2", "average", "staged"]
    assert client.models.retrieve("e1").id == "e1"
    with pytest.raises(openai.NotFoundError, match="did you mean 'e1'"):
        client.models.retrieve("e1x")


@pytest.mark.parametrize(("model", "expert"), [("e1", "e1"), ("average", None), ("auto", "e0")])
def test_a_chat_answer_is_the_experts(server: Server, client: openai.OpenAI, model: str, expert: str | None) -> None:
    raw = client.chat.completions.with_raw_response.create(model=model, messages=HELLO, temperature=0, max_tokens=12)
    answer = raw.parse()
    assert answer.choices[0].message.content == offline(server, "w10 w20 w21", expert, 12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion" and answer.model == model
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.total_tokens == answer.usage.completion_tokens + 5
    assert answer.polymerge["expert"] == raw.headers["x-polymerge-expert"] == (expert or "average")
    assert answer.polymerge["stage"] == "direct" and "thoughts" not in answer.polymerge
    if model == "auto":
        assert answer.polymerge["field"] == raw.headers["x-polymerge-field"] == "zero"
        assert answer.polymerge["confidence"] == float(raw.headers["x-polymerge-confidence"]) == 0.9
    assert raw.headers["x-request-id"]


def test_a_stream_is_the_whole_answer_in_pieces_with_usage(server: Server, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="e0",
            messages=HELLO,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == offline(server, "w10 w20 w21", "e0", 12)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].polymerge["expert"] == "e0"
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 6


def test_a_stream_without_usage_has_none(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="e0", messages=HELLO, max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_several_answers_with_seeds_repeat_and_differ(client: openai.OpenAI) -> None:
    def ask() -> list[Any]:
        answer = client.chat.completions.create(
            model="e0", messages=HELLO, n=3, seed=5, temperature=2.0, top_p=0.9, max_tokens=10
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert first == ask() and len(set(first)) == 3
    chunks = client.chat.completions.create(
        model="e0", messages=HELLO, n=3, seed=5, temperature=2.0, top_p=0.9, max_tokens=10, stream=True
    )
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == first


@pytest.mark.parametrize("many", [False, True])
def test_a_stop_text_ends_the_answer_before_itself(server: Server, client: openai.OpenAI, many: bool) -> None:
    whole = offline(server, "w10 w20 w21", "e0", 12)
    word = whole.split()[4]
    answer = client.chat.completions.create(
        model="e0", messages=HELLO, temperature=0, max_tokens=12, stop=["w999", word] if many else word
    )
    assert answer.choices[0].message.content == whole[: whole.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(
        model="e0", messages=HELLO, temperature=0, max_tokens=12, stop=word, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == whole[: whole.index(word)]


def test_chat_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="e0", messages=HELLO, temperature=0, max_completion_tokens=5, logprobs=True, top_logprobs=4
    )
    content = answer.choices[0].logprobs.content
    assert " ".join(token.token for token in content) == answer.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 4
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert bytes(token.bytes).decode() == token.token
    chunks = list(
        client.chat.completions.create(
            model="e0", messages=HELLO, temperature=0, max_tokens=5, logprobs=True, top_logprobs=4, stream=True
        )
    )
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_system_turns_parts_and_what_the_client_gives_back(server: Server, client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "w30"},
        {"role": "developer", "content": [{"type": "text", "text": "w31"}]},
        {"role": "user", "content": "w10"},
        {"role": "assistant", "content": "w32", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "w33"}, {"type": "text", "text": "w34"}]},
    ]
    answer = client.chat.completions.create(model="e2", messages=messages, temperature=0, max_tokens=6)
    turns = [{"role": "user", "content": text} for text in ("w30", "w31", "w10", "w32", "w33 w34")]
    ids = server.engine.chat_prompt(turns)
    assert answer.choices[0].message.content == server.engine.generate([GenerateRequest(ids, "e2", 6)])[0].text
    again = [*messages, answer.choices[0].message.model_dump(), {"role": "user", "content": "w5"}]
    assert client.chat.completions.create(model="e2", messages=again, max_tokens=2).choices


def test_completions_of_texts_and_tokens(server: Server, client: openai.OpenAI) -> None:
    for prompt in ("w5 w6", [5, 6], ["w5 w6"], [[5, 6]]):
        answer = client.completions.create(model="e1", prompt=prompt, temperature=0, max_tokens=6)
        assert answer.object == "text_completion" and answer.usage.prompt_tokens == 2
        assert answer.choices[0].text == server.engine.generate([GenerateRequest([5, 6], "e1", 6)])[0].text
    both = client.completions.create(model="e1", prompt=["w5 w6", "w7"], n=2, temperature=0, max_tokens=4)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.usage.prompt_tokens == 3
    assert both.choices[0].text == both.choices[1].text
    routed = client.completions.create(model="auto", prompt=["w10", "w12"], temperature=0, max_tokens=4)
    assert [choice.polymerge["expert"] for choice in routed.choices] == ["e0", "e2"]


def test_echo_with_log_probabilities_scores_the_prompt(client: openai.OpenAI) -> None:
    for stream in (False, True):
        completion = client.completions.create(
            model="e1", prompt="w5 w6 w7", echo=True, logprobs=2, max_tokens=1, temperature=0, stream=stream
        )
        choices = [chunk.choices[0] for chunk in completion] if stream else completion.choices
        text = "".join(choice.text for choice in choices)
        assert text.startswith("w5 w6 w7")
        tokens = [token for choice in choices for token in choice.logprobs.tokens]
        logprobs = [value for choice in choices for value in choice.logprobs.token_logprobs]
        top = [value for choice in choices for value in choice.logprobs.top_logprobs]
        assert tokens[:3] == ["w5", "w6", "w7"] and len(tokens) == 4
        assert logprobs[0] is None and top[0] is None
        assert all(value <= 0 for value in logprobs[1:])
        assert all(len(values) == 2 for values in top[1:])
        assert logprobs[3] == max(top[3].values())
    plain = client.completions.create(model="e1", prompt="w5 w6", echo=True, max_tokens=0)
    assert plain.choices[0].text == "w5 w6" and plain.usage.completion_tokens == 0
    streamed = client.completions.create(model="e1", prompt="w5 w6", echo=True, max_tokens=2, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed).startswith("w5 w6")


def test_embeddings_as_numbers_and_packed(server: Server, client: openai.OpenAI) -> None:
    plain = client.embeddings.create(model="auto", input="w5 w6", encoding_format="float")
    packed = client.embeddings.create(model="auto", input=["w5 w6", "w7"])  # the client asks for base64
    assert np.allclose(plain.data[0].embedding, packed.data[0].embedding)
    assert np.allclose(plain.data[0].embedding, server.engine.embed([[5, 6]])[0, 0], atol=1e-5)
    assert [one.index for one in packed.data] == [0, 1] and packed.usage.total_tokens == 3
    tokens = client.embeddings.create(model="auto", input=[5, 6], encoding_format="float")
    assert np.allclose(plain.data[0].embedding, tokens.data[0].embedding)


def test_the_staged_model_answers_in_stages(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="staged", messages=HELLO, temperature=0, extra_body={"polymerge": {"thoughts": True}}
    )
    assert answer.choices[0].message.content == "thought about: w10 w20 w21"
    assert answer.polymerge["stage"] == "staged" and answer.polymerge["thoughts"] == "w20 w21"
    assert answer.usage.completion_tokens == 7
    chunks = list(client.chat.completions.create(
        model="staged", messages=HELLO, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "thought about: w10 w20 w21"
    assert "thoughts" not in chunks[0].polymerge and chunks[-1].usage.total_tokens == 17
    with pytest.raises(openai.BadRequestError, match="n: a staged response") as raised:
        client.chat.completions.create(model="staged", messages=HELLO, n=2)
    assert raised.value.param == "n"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tempature": 1}, "tempature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": 5}, "stop"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"w5": 1}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]}, "messages.0"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"top_logprobs": 2}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "w5 " * 200}]}, "messages"),
        ({"polymerge": {"stick": False}}, "polymerge.stick"),
        ({"model": "e7"}, "model"),
    ],
)
def test_what_is_wrong_or_not_supported_is_named(client: openai.OpenAI, change: dict[str, Any], param: Any) -> None:
    body = {"model": "e0", "messages": HELLO, "max_tokens": 4} | change
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as raised:
        client.post("/chat/completions", body=body, cast_to=object)
    error: Any = raised.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in ("invalid_request_error", "not_found_error")
    if param is None:
        assert next(iter(change)) in error["message"] or "only allowed with" in error["message"]
    else:
        assert (error["param"] or error["message"]).startswith(param)


def test_values_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="e0",
        messages=HELLO,
        max_tokens=2,
        frequency_penalty=0,
        presence_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        store=True,
        metadata={"a": "b"},
        user="someone",
        reasoning_effort="low",
        prompt_cache_key="k",
        service_tier="flex",
        n=1,
        stop=None,
    )
    assert answer.choices


def test_token_ids_outside_the_vocabulary_are_refused(client: openai.OpenAI) -> None:
    for ids in ([5, 96], [10**12]):
        with pytest.raises(openai.BadRequestError, match="the vocabulary ends at 95"):
            client.completions.create(model="e0", prompt=ids)
        with pytest.raises(openai.BadRequestError, match="the vocabulary ends at 95"):
            client.embeddings.create(model="auto", input=ids)


def test_every_stream_tells_its_expert_first_and_last(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="auto", messages=HELLO, max_tokens=6, temperature=0, stream=True)
    plain = client.completions.create(model="auto", prompt="w10 w20", max_tokens=6, temperature=0, stream=True)
    for chunks in (list(chat), list(plain)):
        assert chunks[0].polymerge["expert"] == chunks[-1].polymerge["expert"] == "e0"
        assert not any(hasattr(chunk, "polymerge") for chunk in chunks[1:-1])


def test_turns_of_agents_reach_the_template(client: openai.OpenAI) -> None:
    """AutoGen's names, replayed reasoning, calls of tools and their results, parts with cache marks."""
    turns: list[Any] = [
        {
            "role": "user",
            "name": "someone",
            "content": [{"type": "text", "text": "w5", "cache_control": {"type": "x"}}],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "w6",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "w7"},
        {"role": "function", "name": "f", "content": "w8"},
    ]
    answer = client.chat.completions.create(model="e0", messages=turns, max_tokens=2, temperature=0)
    # this template knows no tools, so they are written in Hermes' words
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    told = [f"<tool_response>\n{text}\n</tool_response>" for text in ("w7", "w8")]
    plain: list[Any] = [{"role": "user", "content": text} for text in ("w5", call, *told)]
    same = client.chat.completions.create(model="e0", messages=plain, max_tokens=2, temperature=0)
    assert answer.choices[0].message.content == same.choices[0].message.content
    assert answer.usage == same.usage


def test_a_begun_answer_is_gone_on_with(client: openai.OpenAI) -> None:
    begun: list[Any] = [*HELLO, {"role": "assistant", "content": "w20 w21"}]
    more = client.chat.completions.create(
        model="e0", messages=begun, max_tokens=3, temperature=0, extra_body={"continue_final_message": True}
    )
    text = "w3 " + HELLO[0]["content"] + " w3 w20 w21"
    plain = client.completions.create(model="e0", prompt=text, max_tokens=3, temperature=0)
    assert more.choices[0].message.content == plain.choices[0].text


def test_biases_and_ends_are_the_requests(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "e0", "messages": HELLO, "max_tokens": 3, "temperature": 0}
    forced = client.chat.completions.create(**ask, logit_bias={"20": 100})
    assert (forced.choices[0].message.content or "").split() == ["w20"] * 3
    end = {"2": 100}
    over = client.chat.completions.create(**ask, logit_bias=end)
    assert over.choices[0].finish_reason == "stop" and over.usage.completion_tokens == 1
    on = client.chat.completions.create(**ask, logit_bias=end, extra_body={"ignore_eos": True})
    assert on.choices[0].finish_reason == "length" and on.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/route", {"input": "w5 \ud83d"}),
        ("/v1/embeddings", {"input": ["w5", "\ud83d"]}),
        ("/v1/completions", {"model": "e0", "prompt": "\ud83d"}),
        ("/v1/chat/completions", {"model": "e0", "messages": [{"role": "user", "content": "w5 \udc00"}]}),
    ],
)
def test_half_a_character_is_refused_everywhere(server: Server, path: str, body: dict[str, Any]) -> None:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    with httpx2.Client() as http:
        answer = http.post(f"{server.url}{path}", content=json.dumps(body), headers=headers)  # as an escape: it is JSON
    assert answer.status_code == 400 and "half a character" in answer.json()["error"]["message"]
