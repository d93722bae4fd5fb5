"""A request that leaves its sampling out is answered as the checkpoint says; one that names it, as it says."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from polymerge.engine import GenerateRequest
from polymerge.engine.defaults import GenerationDefaults
from polymerge.engine.local.batching import BatchingEngine
from polymerge.serve.app import create_app
from tests.conftest import Merged
from tests.serve.conftest import tiny_engine

DEFAULTS = GenerationDefaults(0.7, 0.8, 5, 0.01, 1.3, 9, frozenset({2}))
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def engine(merged: Merged) -> Iterator[BatchingEngine]:
    engine = tiny_engine(merged)
    voices = engine._engine.voices
    voices.average = replace(voices.average, defaults=DEFAULTS)
    yield engine
    engine.close(0)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.01}),
        ({"temperature": 0}, {}),
        ({"temperature": 2, "top_p": 1}, {"temperature": 2.0, "top_k": 5, "min_p": 0.01}),
    ],
)
def test_what_a_request_leaves_out_is_the_checkpoints(
    engine: BatchingEngine, asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    request = GenerateRequest(PROMPT, "e1", max_new_tokens=30, seed=3, repetition_penalty=1.3)
    answer = engine.generate([replace(request, **expected)])[0]
    assert answer != engine.generate([replace(request, **expected, repetition_penalty=1.0)])[0]
    with TestClient(create_app(engine), base_url="http://localhost") as client:
        body = {"model": "e1", "prompt": PROMPT, "max_tokens": 30, "seed": 3, **asked}
        told = client.post("/v1/completions", json=body).json()
    assert (told["choices"][0]["text"], told["usage"]["completion_tokens"]) == (answer.text, answer.tokens)


def test_a_chat_that_names_no_length_has_the_checkpoints(engine: BatchingEngine) -> None:
    body = {"model": "e1", "messages": [{"role": "user", "content": "w5 w6"}], "temperature": 0}
    with TestClient(create_app(engine), base_url="http://localhost") as client:
        short = client.post("/v1/chat/completions", json=body).json()
        longer = client.post("/v1/chat/completions", json={**body, "max_tokens": 12}).json()
    assert short["usage"]["completion_tokens"] == 9 and short["choices"][0]["finish_reason"] == "length"
    assert longer["usage"]["completion_tokens"] > 9
