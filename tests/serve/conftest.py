"""A server on a loopback port: a tiny bundle behind continuous batching, and a router that goes by words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI

from polymerge import load_model
from polymerge.engine.admission import DEFAULT_LIMITS, Limits
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.router import Route
from polymerge.serve.app import create_app
from polymerge.serve.run import listener
from polymerge.serve.settings import ServeSettings
from tests.conftest import Merged
from tests.tiny import tiny_tokenizer

KEY = "k" * 32
TEMPLATE = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
# What the scripted router reads: a word names its field; w9 is out of domain.
FIELDS = {"w10": "zero", "w11": "one", "w12": "two"}


class ScriptedRouter:
    """The first word that it knows names the field; without one it is unsure."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def route(self, texts: Sequence[str]) -> list[Route]:
        self.asked += texts
        return [self._route(text) for text in texts]

    def _route(self, text: str) -> Route:
        field = next((FIELDS[word] for word in text.split() if word in FIELDS), None)
        if field is None:
            return Route(None, "zero", 0.3, dict.fromkeys(FIELDS.values(), 1 / 3), fallback=True, reason="unsure")
        sure = 0.4 if "w13" in text.split() else 0.9  # w13 makes a text doubtful
        rest = (1 - sure) / 2
        scores = {name: sure if name == field else rest for name in FIELDS.values()}
        return Route(f"e{list(FIELDS.values()).index(field)}", field, sure, scores, reason=f"about {field}")


@dataclass
class Staged:
    text: str
    stage: str = "staged"
    reason: str = "the policy is always"
    thought: str = "w20 w21"
    expert: str | None = "e1"
    route: Route | None = None
    prompt_tokens: int = 10
    tokens: int = 7
    thinker_tokens: int = 4


class ScriptedPipeline:
    """Answers with the question."""

    def respond(self, questions: Sequence[Any], *, deadline: float | None = None) -> list[Staged]:
        return [Staged(f"thought about: {question.text}") for question in questions]


@dataclass
class Server:
    app: FastAPI
    engine: Any
    url: str
    uvicorn: uvicorn.Server
    thread: threading.Thread
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, key: str = KEY, **more: Any) -> openai.OpenAI:
        """Closed with the server: what is left to the collector of garbage would warn of an open socket."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **more)
        self.clients.append(made)
        return made


@contextmanager
def running(app: FastAPI, engine: Any) -> Iterator[Server]:
    place = listener("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    for _ in range(500):
        if server.started:
            break
        time.sleep(0.01)
    opened = Server(app, engine, f"http://127.0.0.1:{place.getsockname()[1]}", server, thread)
    try:
        yield opened
    finally:
        for client in opened.clients:
            client.close()
        server.should_exit = True
        thread.join(20)


def tiny_engine(merged: Merged, limits: Limits = DEFAULT_LIMITS) -> BatchingEngine:
    bundle, _ = merged("llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return BatchingEngine(HFEngine(load_model(bundle), tokenizer, fingerprint=bundle.digest), limits)


@pytest.fixture(scope="module")
def engine(merged: Merged) -> Iterator[BatchingEngine]:
    made = tiny_engine(merged)
    yield made
    made.close(0)


@pytest.fixture(scope="module")
def server(engine: BatchingEngine) -> Iterator[Server]:
    """With keys, a router and a pipeline."""
    settings = ServeSettings(keys={"someone": KEY, "other": "o" * 32}, max_tokens=100)
    with running(create_app(engine, ScriptedRouter(), ScriptedPipeline(), settings), engine) as started:
        yield started


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


Serving = Callable[..., Server]
