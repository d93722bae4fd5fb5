"""An endpoint may do anything; a thinker that talks to it ends in a thought or in one line that says why not."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from polymerge.errors import RecipeError
from polymerge.recipe.response import StageSettings, ThinkerSettings
from polymerge.staged import Pipeline, Question, Thought, open_thinker
from polymerge.staged.endpoint import GIVE_UP_AFTER, EndpointThinker
from tests.served import Quiet
from tests.staged.scripted import ScriptedEngine

GOOD = {
    "choices": [{"message": {"role": "assistant", "content": " two and two "}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4},
}
Act = Callable[[BaseHTTPRequestHandler], None]


def answer(handler: BaseHTTPRequestHandler, body: Any = GOOD, status: int = 200, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(data))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, json.dumps(GOOD).encode()[:40], Content_Length="500")
    handler.close_connection = True


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


class Server:
    """An endpoint on this machine that does `acts` one after the other, the last one again and again."""

    def __init__(self) -> None:
        self.acts: list[Act] = [answer]
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                outer.bodies.append(self.body())
                outer.keys.append(self.headers["authorization"])
                act = outer.acts[min(len(outer.bodies), len(outer.acts)) - 1]
                act(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def thinker(self, **settings: Any) -> EndpointThinker:
        given = {"timeout": 0.4, "retries": 2, "concurrency": 1} | settings
        return EndpointThinker(ThinkerSettings(endpoint=self.url, model="m", **given), sleep=lambda seconds: None)


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.http.shutdown()
    started.http.server_close()


def think(thinker: EndpointThinker, prompt: str = "2 + 2?") -> Thought:
    return thinker.think([prompt], max_tokens=32)[0]


def test_a_good_answer_becomes_a_thought_with_its_usage(server: Server) -> None:
    assert think(server.thinker()) == Thought("two and two", 9, 4, "stop")
    assert server.bodies[0] == {
        "model": "m",
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "max_tokens": 32,
        "temperature": 0,
    }


@pytest.mark.parametrize(
    ("act", "reason", "tries"),
    [
        (lambda h: time.sleep(0.8), "no answer within", 3),
        (drip, "no whole answer within", 3),
        (lambda h: answer(h, b"<html>hello</html>"), "not a chat completion", 3),
        (lambda h: answer(h, {"choices": []}), "not a chat completion", 3),
        (lambda h: answer(h, {"choices": [{"message": {"content": None}}]}), "not a chat completion", 3),
        (lambda h: answer(h, b"[" * 100_000), "not a chat completion", 3),
        (lambda h: answer(h, {}, 429, Retry_After="1"), "status 429", 3),
        (lambda h: answer(h, {}, 429, Retry_After="\u00b2"), "status 429", 3),
        (lambda h: answer(h, {}, 503), "status 503", 3),
        (lambda h: answer(h, {}, 401), "is the key right", 1),
        (lambda h: answer(h, {}, 404), "its /v1", 1),
        (lambda h: answer(h, b"", 302, Location="http://127.0.0.1:9/"), "status 302", 1),
        (cut_off, "RemoteProtocolError", 3),
        (lambda h: h.connection.close(), "Error", 3),
    ],
    ids=(
        [
            "slow",
            "drip",
            "html",
            "empty",
            "null",
            "deep",
            "429",
            "429-odd",
            "503",
            "401",
            "404",
            "redirect",
            "cut-off",
            "closed",
        ]
    ),
)
def test_whatever_goes_wrong_is_one_line_after_the_right_number_of_tries(
    server: Server, act: Act, reason: str, tries: int
) -> None:
    server.acts = [act]
    thought = think(server.thinker())
    assert thought.finish == "failed" and reason in thought.error and "\n" not in thought.error
    assert len(server.bodies) == tries


def test_an_endless_thought_is_cut(server: Server) -> None:
    server.acts = [lambda h: answer(h, {"choices": [{"message": {"content": "x" * 1_000_000}}]})]
    assert len(think(server.thinker()).text) == 32 * 16


def test_half_a_character_is_replaced_where_it_enters(server: Server) -> None:
    server.acts = [lambda h: answer(h, b'{"choices": [{"message": {"content": "so \\ud83d it is"}}]}')]
    assert think(server.thinker()).text == "so \ufffd it is"


def test_a_fault_that_passes_costs_nothing(server: Server) -> None:
    server.acts = [lambda h: answer(h, {}, 429), cut_off, answer]
    assert think(server.thinker()).text == "two and two"


def test_pauses_double_and_follow_what_the_server_asks_for(server: Server) -> None:
    pauses: list[float] = []
    settings = ThinkerSettings(endpoint=server.url, model="m", retries=3)
    server.acts = [
        lambda h: answer(h, {}, 500),
        lambda h: answer(h, {}, 429, Retry_After="7"),
        lambda h: answer(h, {}, 429, Retry_After="100000"),
        answer,
    ]
    assert think(EndpointThinker(settings, sleep=pauses.append)).usable
    assert pauses == [0.5, 7.0, 20.0]


def test_an_endpoint_that_is_down_is_not_asked_a_thousand_times() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ThinkerSettings(endpoint=f"http://127.0.0.1:{port}/v1", model="m", retries=1, concurrency=2)
    pauses: list[float] = []
    thoughts = EndpointThinker(settings, sleep=pauses.append).think(["x"] * 100, max_tokens=8)
    assert all(t.finish == "failed" for t in thoughts) and "not asked again" in thoughts[-1].error
    assert len(pauses) <= GIVE_UP_AFTER + 2


def test_a_run_with_a_dead_endpoint_is_answered_directly(server: Server) -> None:
    server.acts = [lambda h: answer(h, {}, 500)]
    pipeline = Pipeline(ScriptedEngine(), StageSettings(use="always"), thinker=server.thinker(retries=0))
    responses = pipeline.respond([Question(f"q{n}") for n in range(10)])
    assert [r.stage for r in responses] == ["direct"] * 10
    assert all(r.text == "written" and ("500" in r.reason or "not asked again" in r.reason) for r in responses)


def test_the_deadline_bounds_all_thoughts_together(server: Server) -> None:
    server.acts = [lambda h: time.sleep(0.3) or answer(h)]  # type: ignore[func-returns-value]
    began = time.monotonic()
    thoughts = server.thinker(timeout=30).think(["x"] * 20, max_tokens=8, deadline=began + 0.5)
    assert time.monotonic() - began < 2
    assert {t.finish for t in thoughts} >= {"failed"}


def test_the_key_comes_from_the_environment_and_is_nowhere_else(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret-key\n")
    caplog.set_level(logging.DEBUG)
    server.acts = [lambda h: answer(h, {"error": h.headers["authorization"]}, 401)]
    thinker = server.thinker(key_env="MY_KEY")
    thought = think(thinker)
    assert server.keys == ["Bearer s3cret-key"]
    shown = f"{thought} {thinker!r} {thinker.name} {thinker.fingerprint} {caplog.text}"
    assert "s3cret" not in shown


@pytest.mark.parametrize("value", [None, "", "  ", "schlüssel", "a\nb"])
def test_a_key_that_cannot_be_is_one_line_that_names_the_variable(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(RecipeError, match="MY_KEY"):
        open_thinker(ThinkerSettings(endpoint="http://127.0.0.1/v1", model="m", key_env="MY_KEY"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "either source"),
        ({"source": "a", "endpoint": "http://x/v1", "model": "m"}, "either source"),
        ({"endpoint": "http://x/v1"}, "needs model"),
        ({"endpoint": "ftp://x", "model": "m"}, "must be a URL"),
        ({"endpoint": "http://user:pass@x/v1", "model": "m"}, "must be a URL"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ThinkerSettings(**settings)
