"""An error names the field that is wrong, and what is wrong with it."""

from typing import Any

import httpx2
import pytest

from tests.serve.conftest import KEY, Server

AUTH = {"authorization": f"Bearer {KEY}"}
TURN = [{"role": "user", "content": "w5"}]


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
        ("route", {"input": []}, "input", "at least 1"),
    ],
)
def test_the_field_and_what_is_wrong(server: Server, path: str, wrong: dict[str, Any], param: str, words: str) -> None:
    right = {"chat/completions": {"messages": TURN}, "completions": {"prompt": "w5"}}.get(path, {})
    answer = httpx2.post(f"{server.url}/v1/{path}", json=right | wrong, headers=AUTH)
    told = answer.json()["error"]
    assert (answer.status_code, told["param"]) == (400, param), told
    assert words in told["message"]


def test_a_method_that_a_route_has_not_is_405_with_or_without_a_body(server: Server) -> None:
    for method in ("DELETE", "GET", "HEAD"):
        assert httpx2.request(method, f"{server.url}/v1/chat/completions", headers=AUTH).status_code == 405
    assert httpx2.post(f"{server.url}/v1/models", json={}, headers=AUTH).status_code == 405
