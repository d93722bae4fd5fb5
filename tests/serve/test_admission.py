"""One admission for everything that touches the model: bounds before work, deadlines from arrival, clients that go."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from polymerge.engine.admission import Limits
from polymerge.engine.local.batching import BatchingEngine
from polymerge.errors import EngineBusyError
from polymerge.router import Route
from polymerge.serve.app import create_app
from polymerge.serve.gate import Gate
from polymerge.serve.settings import ServeSettings
from tests.conftest import Merged
from tests.serve.conftest import ScriptedPipeline, ScriptedRouter, Server, Staged, running, tiny_engine
from tests.serve.slow import slowed
from tests.serve.test_robust import idle

CHAT: dict[str, Any] = {"model": "e0", "messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 3}


class SlowRouter(ScriptedRouter):
    """Waits until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.gate = threading.Event(), threading.Event()

    def route(self, texts: Sequence[str]) -> list[Route]:
        self.begun.set()
        assert self.gate.wait(30)
        return super().route(texts)


@pytest.fixture
def router() -> Iterator[SlowRouter]:
    made = SlowRouter()
    yield made
    made.gate.set()


def post(server: Server, path: str, body: dict[str, Any], seconds: float = 60) -> httpx2.Response:
    return httpx2.post(f"{server.url}{path}", json=body, timeout=seconds)


@contextmanager
def asked(server: Server, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request whose client has not heard yet, and leaves when the socket is closed."""
    data, host = json.dumps(body).encode(), server.url.removeprefix("http://")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port)), timeout=60) as opened:
        opened.sendall(head.encode() + data)
        yield opened


def until(met: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)


def all_left(server: Server, seconds: float = 10) -> None:
    """All places have been given back."""
    until(lambda: server.app.state.service.gate.held == 0, seconds)


def test_places_are_bounded_and_come_back_once() -> None:
    gate = Gate(3)
    give_back = gate.take(2)
    with pytest.raises(EngineBusyError):
        gate.take(2)
    give_back()
    give_back()
    assert gate.held == 0 and gate.take(3) and gate.held == 3


def test_many_texts_do_not_hold_up_a_chat_and_end_with_their_client(merged: Merged) -> None:
    engine = tiny_engine(merged)
    embed = engine._engine.embed
    slices: list[int] = []
    texts = {"model": "average", "input": ["w5 " * 90] * 150}

    def slow(prompts: Sequence[Any], **more: Any) -> Any:
        slices.append(len(prompts))
        time.sleep(0.3)
        return embed(prompts, **more)

    engine._engine.embed = slow  # type: ignore[method-assign]
    with running(create_app(engine), engine) as server, asked(server, "/v1/embeddings", texts) as gone:
        until(lambda: bool(slices))
        began = time.monotonic()
        assert post(server, "/v1/chat/completions", CHAT).status_code == 200
        assert time.monotonic() - began < 7  # all slices together take nine seconds and more
        gone.close()
        all_left(server)
        time.sleep(0.7)  # what was begun
        done = len(slices)
        time.sleep(0.7)
        assert len(slices) == done < 30 and max(slices) <= 8
    engine.close(0)


def refused_unread(server: Server) -> None:
    """A full server waits for no body, and the connection goes on after what was left of it."""
    host = server.url.removeprefix("http://")
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port)), timeout=5) as opened:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        opened.sendall(f"{head}Content-Length: 9\r\n\r\n".encode() + b'{"mod')
        assert opened.recv(4096).startswith(b"HTTP/1.1 429")
        opened.sendall(f'el"}}GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n'.encode())
        told = b""
        while b"HTTP/1.1" not in told:
            told += opened.recv(4096)
        assert b"HTTP/1.1 200" in told
    counted = httpx2.get(f"{server.url}/metrics").text
    assert 'polymerge_requests_total{endpoint="/v1/completions",status="429"}' in counted


def test_a_full_server_says_so_before_it_routes(engine: BatchingEngine, router: SlowRouter) -> None:
    settings = ServeSettings(max_rows=1, max_waiting=2)
    with running(create_app(engine, router, settings=settings), engine) as server, ThreadPoolExecutor(3) as pool:
        auto = CHAT | {"model": "auto"}
        inside = [pool.submit(post, server, "/v1/chat/completions", auto) for _ in range(3)]
        assert router.begun.wait(30)
        until(lambda: server.app.state.service.gate.held == 3)
        for path, body in (
            ("/v1/chat/completions", auto),
            ("/v1/embeddings", {"model": "average", "input": "w5"}),
            ("/v1/route", {"input": "w5"}),
            ("/v1/completions", {"model": "e0", "prompt": "w5"}),
        ):
            began = time.monotonic()
            refused = post(server, path, body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"] and time.monotonic() - began < 1
        refused_unread(server)
        router.gate.set()
        assert [answer.result().status_code for answer in inside] == [200] * 3
        all_left(server)
        assert post(server, "/v1/chat/completions", CHAT | {"n": 4}).status_code == 400  # more than there are places


def test_limits_are_checked_before_any_work(engine: BatchingEngine, router: SlowRouter) -> None:
    settings = ServeSettings(max_choices=4, max_texts=3, max_tokens=50)
    with running(create_app(engine, router, settings=settings), engine) as server:
        for path, body, param in (
            ("/v1/chat/completions", CHAT | {"model": "auto", "n": 5}, "n"),
            ("/v1/chat/completions", CHAT | {"model": "auto", "max_tokens": 51}, "max_tokens"),
            ("/v1/completions", {"model": "auto", "prompt": ["w5"] * 5}, "prompt"),
            ("/v1/embeddings", {"input": ["w5"] * 4}, "input"),
            ("/v1/route", {"input": ["w5"] * 4}, "input"),
        ):
            refused = post(server, path, body, 5)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), path
    assert not router.asked


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/route", "/v1/completions"])
def test_the_deadline_counts_from_the_request_and_the_wait_for_the_router_is_part_of_it(
    engine: BatchingEngine, router: SlowRouter, path: str
) -> None:
    with running(create_app(engine, router, settings=ServeSettings(seconds=0.5)), engine) as server:
        body = {"input": "w10"} if path == "/v1/route" else CHAT | {"model": "auto"}
        if path == "/v1/completions":
            body = {"model": "auto", "prompt": ["w10", "w11"]}
        began = time.monotonic()
        late = post(server, path, body)
        assert late.status_code == 504 and time.monotonic() - began < 1.5
        assert "within 0.5 s" in late.json()["error"]["message"]
        all_left(server)


def test_a_step_that_hangs_does_not_hang_the_deadline_of_a_stream(merged: Merged) -> None:
    engine = tiny_engine(merged)
    slowed(engine, 2.0)
    with running(create_app(engine, settings=ServeSettings(seconds=0.5)), engine) as server:
        began = time.monotonic()
        told = post(server, "/v1/chat/completions", CHAT | {"stream": True, "max_tokens": 50}).text
        assert "within 0.5 s" in told and "[DONE]" not in told and time.monotonic() - began < 1.5
        all_left(server)
    engine.close(0)


def test_a_client_that_goes_while_it_waits_gives_its_place_back(engine: BatchingEngine, router: SlowRouter) -> None:
    with running(create_app(engine, router), engine) as server:
        with asked(server, "/v1/chat/completions", CHAT | {"model": "auto"}):
            assert router.begun.wait(30)
            assert server.app.state.service.gate.held == 1
        all_left(server, 5)


def test_staged_requests_that_wait_do_not_block_others(engine: BatchingEngine) -> None:
    begun, gate = threading.Event(), threading.Event()

    class Slow(ScriptedPipeline):
        def respond(self, questions: Sequence[Any], *, deadline: float | None = None) -> list[Staged]:
            begun.set()
            assert gate.wait(60)
            return super().respond(questions, deadline=deadline)

    async def ask(server: Server) -> list[int]:
        async with httpx2.AsyncClient(
            base_url=server.url, timeout=60, limits=httpx2.Limits(max_connections=60)
        ) as http:
            staged = CHAT | {"model": "staged"}
            waiting = [asyncio.create_task(http.post("/v1/chat/completions", json=staged)) for _ in range(45)]
            while not begun.is_set():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            began = time.monotonic()
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
            assert time.monotonic() - began < 3
            gate.set()
            return [(await one).status_code for one in waiting]

    with running(create_app(engine, None, Slow()), engine) as server:
        assert asyncio.run(ask(server)) == [200] * 45


def test_a_thought_that_nobody_waits_for_ends_the_answers_in_this_engine(merged: Merged) -> None:
    engine = tiny_engine(merged)
    slowed(engine, 0.1)
    from polymerge.engine import GenerateRequest

    class Long(ScriptedPipeline):
        def respond(self, questions: Sequence[Any], *, deadline: float | None = None) -> list[Staged]:
            return [Staged(engine.generate([GenerateRequest([5, 6], "e0", 110)])[0].text) for _ in questions]

    with running(create_app(engine, None, Long()), engine) as server:
        with asked(server, "/v1/chat/completions", CHAT | {"model": "staged"}):
            until(lambda: engine.state.running == 1)
        began = time.monotonic()
        assert idle(engine) and time.monotonic() - began < 5  # the whole answer would take eleven seconds
    engine.close(0)


def test_streams_are_logged_where_prompts_are(engine: BatchingEngine, caplog: pytest.LogCaptureFixture) -> None:
    app, greedy = create_app(engine, settings=ServeSettings(log_prompts=True)), CHAT | {"temperature": 0}
    with running(app, engine) as server, caplog.at_level(logging.INFO, "polymerge.serve"):
        whole = post(server, "/v1/chat/completions", greedy).json()
        assert post(server, "/v1/chat/completions", greedy | {"stream": True}).status_code == 200
        all_left(server)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("prompt ")]
    assert len(told) == 2 and told[0] == told[1]
    assert repr(whole["choices"][0]["message"]["content"]) in told[0]


def test_limits_of_the_engine_are_those_of_the_gate(merged: Merged) -> None:
    """What the gate lets in, the engine never refuses."""
    engine = tiny_engine(merged, Limits(max_rows=2, max_waiting=3))
    app = create_app(engine, settings=ServeSettings(max_rows=2, max_waiting=3))
    assert app.state.service.gate.most == engine._places == 5
    engine.close(0)
