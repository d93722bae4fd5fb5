"""Faults: clients that go, full queues, engines that break, ends under load, and a flood of nonsense."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from polymerge.engine.admission import Limits
from polymerge.engine.local.batching import BatchingEngine
from polymerge.serve.app import create_app
from polymerge.serve.settings import ServeSettings
from tests.conftest import Merged
from tests.serve.conftest import ScriptedRouter, Server, running, tiny_engine
from tests.serve.slow import slowed

HELLO: list[Any] = [{"role": "user", "content": "w5 w6"}]


@pytest.fixture
def slow(merged: Merged) -> Iterator[Server]:
    """A server whose answers end only at their budget, a few milliseconds a token, one at a time."""
    engine = tiny_engine(merged, Limits(max_rows=1, max_waiting=2))
    slowed(engine, 0.01)
    with running(create_app(engine, ScriptedRouter(), settings=ServeSettings(max_tokens=120)), engine) as server:
        yield server
    engine.close(0)


def idle(engine: BatchingEngine, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if engine.state.running == engine.state.waiting == 0:
            return True
        time.sleep(0.01)
    return False


def test_a_client_that_goes_stops_its_answer(slow: Server) -> None:
    with slow.client() as client:
        stream = client.chat.completions.create(model="e0", messages=HELLO, max_tokens=110, stream=True)
        for number, _ in enumerate(stream):
            if number == 3:
                break
        stream.close()
    began = time.monotonic()
    assert idle(slow.engine) and time.monotonic() - began < 0.6
    with pytest.raises(openai.APITimeoutError):
        slow.client(timeout=0.2).chat.completions.create(model="e0", messages=HELLO, max_tokens=110)
    began = time.monotonic()
    assert idle(slow.engine) and time.monotonic() - began < 0.6


def test_a_full_queue_is_429_with_retry_after_and_nothing_else_suffers(slow: Server) -> None:
    results: list[Any] = []

    def ask() -> None:
        try:
            results.append(slow.client().chat.completions.create(model="e0", messages=HELLO, max_tokens=30))
        except openai.RateLimitError as error:
            results.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert 1 <= len(refused) <= 5
    assert all(error.response.headers["retry-after"] and error.code == "queue_full" for error in refused)
    answers = [result for result in results if not isinstance(result, Exception)]
    assert all(answer.usage.completion_tokens == 30 for answer in answers) and len(answers) >= 3


def test_an_answer_that_is_not_whole_in_time_is_a_504_or_an_event(merged: Merged) -> None:
    engine = tiny_engine(merged)
    slowed(engine, 0.02)
    with running(create_app(engine, settings=ServeSettings(seconds=0.3)), engine) as server:
        with pytest.raises(openai.InternalServerError, match=r"within 0\.3 s") as raised:
            server.client().chat.completions.create(model="e0", messages=HELLO, max_tokens=100)
        assert raised.value.status_code == 504
        stream = server.client().chat.completions.create(model="e0", messages=HELLO, max_tokens=100, stream=True)
        text = ""
        with pytest.raises(openai.APIError, match=r"within 0\.3 s"):
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text  # what came before the error stays
    engine.close(0)


def test_a_broken_engine_is_503_until_it_is_back_and_nothing_is_lost(slow: Server, monkeypatch: Any) -> None:
    engine: Any = slow.engine
    expected = slow.client().chat.completions.create(model="e0", messages=HELLO, max_tokens=40, temperature=0)
    step, calls, gate = engine._batch.step, [0], threading.Event()

    def broken() -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise ZeroDivisionError
        step()

    monkeypatch.setattr(engine._batch, "step", broken)
    monkeypatch.setattr(engine, "_works", lambda pause: gate.wait(10))
    answers: list[Any] = []

    def ask() -> None:
        answers.append(slow.client().chat.completions.create(model="e0", messages=HELLO, max_tokens=40, temperature=0))

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(500):
        if engine.state.status == "restarting":
            break
        time.sleep(0.01)
    ready = httpx2.get(f"{slow.url}/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "restarting"}) and ready.headers["retry-after"]
    assert httpx2.get(f"{slow.url}/health").status_code == 200
    with pytest.raises(openai.InternalServerError) as raised:
        slow.client().chat.completions.create(model="e0", messages=HELLO)
    assert raised.value.status_code == 503 and raised.value.response.headers["retry-after"]
    gate.set()
    thread.join(20)
    assert answers[0].choices[0].message.content == expected.choices[0].message.content
    assert httpx2.get(f"{slow.url}/ready").status_code == 200


def test_an_engine_beyond_repair_is_unhealthy_so_that_it_is_started_anew(slow: Server) -> None:
    slow.engine.close(0)
    assert httpx2.get(f"{slow.url}/health").status_code == 503
    assert httpx2.get(f"{slow.url}/ready").json() == {"status": "stopped"}


def test_metrics_count_requests_tokens_and_routes(slow: Server) -> None:
    slow.client().chat.completions.create(model="auto", messages=[{"role": "user", "content": "w11"}], max_tokens=7)
    slow.client().chat.completions.create(model="auto", messages=HELLO, max_tokens=5)
    page = httpx2.get(f"{slow.url}/metrics").text
    for line in (
        'polymerge_requests_total{endpoint="/v1/chat/completions",status="200"} 2.0',
        'polymerge_tokens_total{kind="completion"} 12.0',
        'polymerge_routes_total{expert="e1"} 1.0',
        'polymerge_routes_total{expert="average"} 1.0',
        "polymerge_fallbacks_total 1.0",
        "polymerge_confidence_count 2.0",
        "polymerge_first_token_seconds_count 2.0",
        "polymerge_running 0.0",
        "polymerge_waiting 0.0",
    ):
        assert line in page
    httpx2.get(f"{slow.url}/some/made/up/path")
    assert "made/up" not in httpx2.get(f"{slow.url}/metrics").text


def test_sigterm_under_load_cuts_no_answer(merged: Merged, tmp_path: Path) -> None:
    """The command itself, in a process of its own."""
    bundle, _ = merged("llama")
    code = f"from tests.serve.slow import main; main({str(bundle.path)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def ask(number: int) -> Any:
        chunks = 0
        stream = await client.completions.create(model="e1", prompt=[5, 6, 7 + number], max_tokens=60, stream=True)
        async for chunk in stream:
            chunks += 1
            if number == 0 and chunks == 5:
                process.send_signal(signal.SIGTERM)
            if chunk.choices[0].finish_reason:
                return chunk.choices[0].finish_reason
        return "cut"

    async def everyone() -> list[Any]:
        async with client:
            return await asyncio.gather(*[ask(number) for number in range(6)])

    try:
        assert asyncio.run(everyone()) == ["length"] * 6
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")


def test_hundreds_of_malformed_requests_leave_the_server_alive_and_its_memory_flat(
    engine: BatchingEngine,
) -> None:
    flood(engine, 500)


@pytest.mark.slow
def test_ten_thousand_malformed_requests(engine: BatchingEngine) -> None:
    flood(engine, 10_000)


def flood(engine: BatchingEngine, count: int) -> None:
    draw = random.Random(0)
    with running(create_app(engine, ScriptedRouter()), engine) as server, httpx2.Client() as client:
        send(client, server, draw, count // 4)
        before = psutil.Process().memory_info().rss
        send(client, server, draw, count)
        grown = psutil.Process().memory_info().rss - before
        assert grown < 30e6
        assert server.client().chat.completions.create(model="e0", messages=HELLO, max_tokens=2).choices
    assert idle(engine)


def send(client: httpx2.Client, server: Server, draw: random.Random, count: int) -> None:
    routes = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/route", "/v1/models/x", "/"]
    for _ in range(count):
        answer = client.post(
            server.url + draw.choice(routes), content=nonsense(draw), headers={"content-type": "application/json"}
        )
        assert 400 <= answer.status_code < 500, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def nonsense(draw: random.Random) -> bytes:
    """Broken bytes, broken JSON, deep JSON, and requests that are almost right."""
    almost = {"model": "e0", "messages": HELLO, "prompt": "w5", "input": "w5", "max_tokens": 1}
    wrong: list[Any] = [None, [], {}, "\ud800", 1e308, -1, 10**30, True, ["w5", 5], [[]], {"a": {"b": []}}, "w5" * 500]
    kind = draw.randrange(6)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        return b"[" * draw.randrange(1, 20_000)
    if kind == 2:
        return json.dumps(almost).encode()[: draw.randrange(1, 60)]
    if kind == 3:
        return b'{"seed": ' + b"9" * draw.randrange(5000, 6000) + b"}"
    if kind == 4:
        return b'{"temperature": NaN, "messages": Infinity, "x": 1}'
    name = draw.choice([*almost, "temperature", "n", "stop", "seed", "logprobs", "stream", "polymerge"])
    return json.dumps(almost | {name: draw.choice(wrong), "unknown": 1}).encode()
