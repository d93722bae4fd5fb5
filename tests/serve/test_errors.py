"""An error names the field that is wrong, and what is wrong with it."""

import json
from typing import Any

import httpx2
import pytest

from tests.serve.conftest import KEY, Server

AUTH = {"authorization": f"Bearer {KEY}"}
TURN = [{"role": "user", "content": "w5"}]
LONG, LONGISH = ([{"role": "user", "content": " ".join(["w5"] * count)}] for count in (500, 60))


@pytest.mark.parametrize(
    ("path", "wrong", "param", "words"),
    [
        ("chat/completions", {"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ("chat/completions", {"stop": [5]}, "stop", "string"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
        ("chat/completions", {"temperature": 3}, "temperature", "less than or equal to 2"),
        ("completions", {"prompt": []}, "prompt", "at least 1"),
        ("completions", {"prompt": [5, -1]}, "prompt.1", "greater than or equal to 0"),
        ("completions", {"prompt": [[5], []]}, "prompt.1", "at least 1"),
        ("embeddings", {"input": []}, "input", "at least 1"),
        ("embeddings", {"input": [-5]}, "input.0", "greater than or equal to 0"),
        ("embeddings", {"input": [9999999]}, "input", "vocabulary ends"),
        ("route", {"input": []}, "input", "at least 1"),
        ("route", {}, "input", "either"),
        ("chat/completions", {"max_tokens": 101}, "max_tokens", "at most 100"),
        ("chat/completions", {"max_completion_tokens": 101}, "max_completion_tokens", "at most 100"),
        ("responses", {"max_output_tokens": 101}, "max_output_tokens", "at most 100"),
        ("chat/completions", {"messages": LONG}, "messages", "leave no room"),
        ("chat/completions", {"messages": LONG, "max_tokens": 3}, "messages", "leave no room"),
        ("chat/completions", {"messages": LONG, "model": "staged"}, "messages", "leave no room"),
        ("responses", {"input": LONG[0]["content"]}, "input", "leave no room"),
        ("completions", {"prompt": LONG[0]["content"]}, "prompt", "leave no room"),
        ("chat/completions", {"messages": LONGISH, "max_tokens": 100}, "max_tokens", "the answer up to 100"),
        ("chat/completions", {"messages": LONGISH, "max_completion_tokens": 100}, "max_completion_tokens", "up to"),
        ("completions", {"prompt": [9999999], "model": "e0"}, "prompt", "vocabulary ends"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice", "tools is empty"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}, "messages", "surrogate"),
        ("chat/completions", {"stop_token_ids": [2]}, "stop_token_ids", "not supported"),
        ("chat/completions", {"min_tokens": 3}, "min_tokens", "not supported"),
    ],
)
def test_the_field_and_what_is_wrong(server: Server, path: str, wrong: dict[str, Any], param: str, words: str) -> None:
    right = {"chat/completions": {"messages": TURN}, "completions": {"prompt": "w5"}, "responses": {"input": "w5"}}
    body = json.dumps(right.get(path, {}) | wrong)
    headers = {**AUTH, "content-type": "application/json"}
    answer = httpx2.post(f"{server.url}/v1/{path}", content=body, headers=headers)
    told = answer.json()["error"]
    assert (answer.status_code, told["param"]) == (400, param), told
    assert words in told["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is empty"),
        (b"{", "the body is not JSON"),
        (b'"\xff"', "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'{"n":' + b"1" * 5000 + b"}", "the body is not JSON"),
    ],
    ids=["empty", "cut", "bytes", "deep", "long number"],
)
def test_what_is_wrong_with_a_body_that_cannot_be_read(server: Server, body: bytes, words: str) -> None:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, words)


def test_a_method_that_a_route_has_not_is_405_with_or_without_a_body(server: Server) -> None:
    for method in ("DELETE", "GET", "HEAD"):
        assert httpx2.request(method, f"{server.url}/v1/chat/completions", headers=AUTH).status_code == 405
    assert httpx2.post(f"{server.url}/v1/models", json={}, headers=AUTH).status_code == 405
    for method in ("PUT", "PATCH"):
        assert (
            httpx2.request(method, f"{server.url}/v1/chat/completions", headers=AUTH, content=b"x").status_code == 405
        )


def test_a_field_that_asks_for_nothing_is_taken(server: Server) -> None:
    harmless = {"min_tokens": 0, "length_penalty": 1, "use_beam_search": False, "stop_token_ids": [], "n": 1,
                "verbosity": "low", "skip_special_tokens": True, "priority": 3,
                "request_id": "a", "best_of": 1}  # fmt: skip
    body = {"model": "e0", "prompt": "w5", "max_tokens": 2} | harmless
    assert httpx2.post(f"{server.url}/v1/completions", json=body, headers=AUTH).status_code == 200
    nothing = {"audio": None, "functions": [], "function_call": "none", "web_search_options": None}
    chat = {"model": "e0", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 2}
    assert httpx2.post(f"{server.url}/v1/chat/completions", json=chat | nothing, headers=AUTH).status_code == 200
    for more in ({"functions": [{"name": "f"}]}, {"function_call": {"name": "f"}}, {"audio": {"voice": "a"}}):
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=chat | more, headers=AUTH)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(more))
