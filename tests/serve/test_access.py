"""Keys, rates, hosts and sizes: what stands before every route."""

import base64
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from polymerge.engine.local.batching import BatchingEngine
from polymerge.errors import PolymergeError
from polymerge.serve.access import Buckets
from polymerge.serve.app import create_app
from polymerge.serve.keys import read_keys
from polymerge.serve.run import guarded
from polymerge.serve.settings import ServeSettings
from tests.serve.conftest import KEY, ScriptedRouter, Server, running

BODY = {"model": "e0", "messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 2}
AUTH = {"authorization": f"Bearer {KEY}"}


def test_every_route_but_health_needs_a_key(server: Server) -> None:
    """All routes of the application, those of later versions too, and paths that are none."""
    paths = {(method, route.path) for route in _flat(server.app.routes) for method in route.methods}
    assert len(paths) > 10
    with httpx2.Client(base_url=server.url) as client:
        for method, path in sorted(paths | {("GET", "/nothing"), ("POST", "/v1/nothing")}):
            for headers in ({}, {"authorization": "Bearer " + "x" * 32}, {"authorization": KEY}):
                answer = client.request(method, path.replace("{model}", "e0"), headers=headers)
                if path == "/health":
                    assert answer.status_code == 200
                else:
                    assert answer.status_code == 401, (method, path)
                    assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"


def _flat(routes: Any) -> Iterator[Any]:
    for route in routes:
        inner = getattr(route, "original_router", route)  # FastAPI keeps an included router whole
        yield from _flat(inner.routes) if hasattr(inner, "routes") else [inner]


def test_every_key_opens_by_bearer_and_by_a_browsers_password(server: Server) -> None:
    for key in (KEY, "o" * 32):
        basic = base64.b64encode(f"anyone:{key}".encode()).decode()
        for header in (f"Bearer {key}", f"bearer  {key}", f"Basic {basic}"):
            assert httpx2.get(f"{server.url}/v1/models", headers={"authorization": header}).status_code == 200
    for header in ("Basic !!!", "Basic " + base64.b64encode(b"\xff").decode(), "Bearer", ""):
        assert httpx2.get(f"{server.url}/v1/models", headers={"authorization": header}).status_code == 401


def test_rates_are_kept_for_every_key_apart(engine: BatchingEngine) -> None:
    settings = ServeSettings(keys={"a": "a" * 16, "b": "b" * 16}, requests_per_minute=3)
    with running(create_app(engine, settings=settings), engine) as server:
        statuses = [get(server, "a").status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        refused = get(server, "a")
        assert 1 <= int(refused.headers["retry-after"]) <= 21
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert get(server, "b").status_code == 200


def get(server: Server, letter: str) -> httpx2.Response:
    return httpx2.get(f"{server.url}/v1/models", headers={"authorization": "Bearer " + letter * 16})


def test_a_bucket_fills_again() -> None:
    now = [0.0]
    buckets = Buckets(60, clock=lambda: now[0])
    assert all(buckets.take("a") == 0 for _ in range(60))
    assert buckets.take("a") == pytest.approx(1.0)
    now[0] = 2.5
    assert [buckets.take("a") == 0 for _ in range(3)] == [True, True, False]


def test_bodies_are_bounded_and_json(engine: BatchingEngine) -> None:
    with running(create_app(engine, settings=ServeSettings(max_body_bytes=500)), engine) as server:
        url = f"{server.url}/v1/chat/completions"
        large = BODY | {"user": "x" * 600}
        assert httpx2.post(url, json=large).status_code == 413

        def chunks() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 100

        chunked = httpx2.post(url, content=chunks(), headers={"content-type": "application/json"})
        assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "body_too_large"
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            assert httpx2.post(url, content="{}", headers={"content-type": kind}).status_code == 415
        assert httpx2.post(url, json=BODY).status_code == 200


def test_a_local_server_is_not_asked_by_a_foreign_name(engine: BatchingEngine) -> None:
    settings = guarded(ServeSettings(hosts=("box.example",)), "127.0.0.1")
    with running(create_app(engine, settings=settings), engine) as server:
        port = server.url.rsplit(":", 1)[1]
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "[::1]", "box.example"):
            assert httpx2.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
            assert httpx2.get(f"{server.url}/v1/models", headers={"host": host}).status_code in (400, 421), host


def test_other_machines_need_a_key_unless_told_otherwise() -> None:
    with pytest.raises(PolymergeError, match="--api-key-file"):
        guarded(ServeSettings(), "0.0.0.0")
    assert guarded(ServeSettings(), "0.0.0.0", everyone=True).hosts == ()
    assert guarded(ServeSettings(keys={"a": "b"}), "::").hosts == ()
    assert "localhost" in guarded(ServeSettings(), "::1").hosts


def test_other_origins_are_refused_unless_allowed(engine: BatchingEngine) -> None:
    ask = {"origin": "https://page.example", "access-control-request-method": "POST"}
    for origins, allowed in (((), None), (("https://page.example",), "https://page.example")):
        with running(create_app(engine, settings=ServeSettings(cors_origins=origins)), engine) as server:
            answer = httpx2.options(f"{server.url}/v1/chat/completions", headers=ask)
            assert answer.headers.get("access-control-allow-origin") == allowed


def test_no_answer_holds_a_path_or_a_stack(engine: BatchingEngine, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ScriptedRouter):
        def route(self, texts: Any) -> Any:
            raise PolymergeError("/secret/place/router.json: broken")

    with running(create_app(engine, Broken()), engine) as server:
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=BODY | {"model": "auto"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text and "Traceback" not in answer.text
        assert "/secret/place" in caplog.text  # the log says why
        assert httpx2.post(f"{server.url}/v1/chat/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("logged", [False, True])
def test_prompts_are_logged_only_when_asked_for(
    engine: BatchingEngine, caplog: pytest.LogCaptureFixture, logged: bool
) -> None:
    caplog.set_level(logging.DEBUG, "polymerge")
    with running(create_app(engine, settings=ServeSettings(log_prompts=logged)), engine) as server:
        assert httpx2.post(f"{server.url}/v1/chat/completions", json=BODY).status_code == 200
    assert "/v1/chat/completions 200" in caplog.text
    assert ("w5 w6" in caplog.text) == logged


def test_a_key_file_is_read_and_its_faults_are_a_line_without_the_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nalice {KEY}\n{'z' * 20}\n")
    assert read_keys(file) == {"alice": KEY, "key-4": "z" * 20}
    assert KEY not in repr(ServeSettings(keys=read_keys(file)))
    for text, message in [
        ("short", "line 1"),
        (f"a {KEY}\nb {KEY}", "line 2"),
        ("a b c", "line 1"),
        ("# none", "holds no key"),
        ("schlüssel-schlüssel", "ASCII"),
    ]:
        file.write_text(text)
        with pytest.raises(PolymergeError, match=message) as raised:
            read_keys(file)
        assert KEY not in str(raised.value)
    with pytest.raises(PolymergeError, match="cannot be read"):
        read_keys(tmp_path / "none")
