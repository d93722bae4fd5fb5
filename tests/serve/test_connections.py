"""Connections that bring no request, on real sockets."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from polymerge.engine.local.batching import BatchingEngine
from polymerge.serve.app import create_app
from polymerge.serve.connections import Refusals, connections_that_fit
from polymerge.serve.keys import KeyRing, read_keys
from polymerge.serve.run import listener, run_app
from polymerge.serve.settings import ServeSettings
from tests.conftest import Merged
from tests.serve.conftest import KEY


@contextmanager
def served(engine: BatchingEngine, **limits: Any) -> Iterator[tuple[str, int]]:
    """`run_app` in a thread."""
    ready, stops = threading.Event(), list[Any]()
    settings, place = ServeSettings(drain_seconds=1, **limits), listener("127.0.0.1", 0)
    address, app = place.getsockname(), create_app(engine, settings=settings)

    def on_ready(stop: Any) -> None:
        stops.append(stop)
        ready.set()

    thread = threading.Thread(target=run_app, args=(app, place, settings, on_ready), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield address
    finally:
        stops[0]()
        thread.join(20)
        assert not thread.is_alive()


def health(address: tuple[str, int]) -> float:
    began = time.monotonic()
    assert httpx2.get(f"http://{address[0]}:{address[1]}/health", timeout=5).status_code == 200
    return time.monotonic() - began


def half_open(stack: ExitStack, address: tuple[str, int], count: int) -> list[socket.socket]:
    opened = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(count)]
    for one in opened:
        one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Half: ")
    return opened


def test_half_a_header_is_closed_in_time_and_told_in_one_line(
    engine: BatchingEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with served(engine, header_seconds=1.0) as address, ExitStack() as stack:
        opened = half_open(stack, address, 30)
        assert max(health(address) for _ in range(5)) < 1
        began = time.monotonic()
        for one in opened:
            with pytest.raises(ConnectionError):  # reset, not answered
                if not one.recv(1):
                    raise ConnectionResetError
        assert time.monotonic() - began < 5
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1 and "without a whole header in 1 s" in told[0].getMessage()


def test_the_second_header_of_a_connection_has_a_deadline_too(engine: BatchingEngine) -> None:
    with served(engine, header_seconds=0.5) as address, ExitStack() as stack:
        one = stack.enter_context(socket.create_connection(address, timeout=10))
        one.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in one.recv(4096)
        one.sendall(b"GET /hea")
        with pytest.raises(ConnectionError):
            while one.recv(4096):
                pass
            raise ConnectionResetError


def test_more_connections_than_there_may_be_cost_the_idlest_its_place(
    engine: BatchingEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with served(engine, max_connections=10) as address, ExitStack() as stack:
        opened = half_open(stack, address, 40)
        assert max(health(address) for _ in range(5)) < 1
        for one in opened[:20]:
            with pytest.raises(ConnectionError):
                if not one.recv(1):
                    raise ConnectionResetError
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_what_is_no_http_is_told_once(engine: BatchingEngine, caplog: pytest.LogCaptureFixture) -> None:
    with served(engine) as address:
        for _ in range(20):
            with socket.create_connection(address, timeout=10) as one:
                one.sendall(b"\x16\x03\x01 no http\r\n\r\n")
                assert b"400" in one.recv(4096)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_refusals_are_summed_up_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    refusals = Refusals(clock=lambda: now[0])
    for second in range(121):
        now[0] = float(second)
        refusals.add("late")
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"connections closed: {count} late" for count in (1, 60, 60)]


def test_the_limit_of_open_files_bounds_connections() -> None:
    assert connections_that_fit(5) == 5
    assert connections_that_fit(10**9) >= 1


def test_keys_are_read_again_and_a_bad_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {KEY} admin\n")
    file.chmod(0o600)
    ring = KeyRing(read_keys(file), file)
    assert not caplog.records
    assert ring.name(f"Bearer {KEY}") == "alice"
    ring.check_admin("alice")
    file.write_text("bob " + "b" * 16 + "\n")
    ring.reread()
    assert ring.name("Bearer " + "b" * 16) == "bob"
    for refused, call in ((401, lambda: ring.name(f"Bearer {KEY}")), (403, lambda: ring.check_admin("bob"))):
        with pytest.raises(Exception) as raised:
            call()
        assert raised.value.status == refused  # type: ignore[attr-defined]
    file.write_text("bob short\n")
    ring.reread()
    assert ring.name("Bearer " + "b" * 16) == "bob"
    assert "the keys stay as they were" in caplog.text
    file.chmod(0o644)
    caplog.clear()
    file.write_text("bob " + "b" * 16 + "\n")
    read_keys(file)
    assert "chmod 600" in caplog.text and "b" * 16 not in caplog.text


def test_keys_change_on_sighup_and_no_stream_is_cut(merged: Merged, tmp_path: Path) -> None:
    """The command itself, in a process of its own."""
    bundle, file = merged("llama")[0], tmp_path / "keys"
    file.write_text(f"old {KEY}\n")
    file.chmod(0o600)
    code = f"from tests.serve.slow import main; main({str(bundle.path)!r}, '--api-key-file', {str(file)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    old, new = ({"authorization": f"Bearer {key}"} for key in (KEY, "n" * 16))
    body = {"model": "e1", "prompt": [5, 6, 7], "max_tokens": 60, "stream": True}
    try:
        url = json.loads(process.stdout.readline())["url"]
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, headers=old, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data:")
            file.write_text("new " + "n" * 16 + "\n")
            process.send_signal(signal.SIGHUP)
            until = time.monotonic() + 20
            while httpx2.get(f"{url}/v1/models", headers=new).status_code != 200:
                assert time.monotonic() < until
            assert httpx2.get(f"{url}/v1/models", headers=old).status_code == 401
            assert [line for line in lines if line][-1] == "data: [DONE]"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()
