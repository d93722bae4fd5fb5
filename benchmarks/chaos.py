"""A server under everything at once: many clients, of whom 40% leave at random, and connections that never ask.

Chats with named models, mixtures, `auto` and `staged`, whole and streamed, many prompts, many texts to embed and to
route, each kind as often. For half of the time there are also half-open connections. Held against what the server
promises: a 429 comes at once, no deadline is missed by more than a second, memory does not grow, greedy answers are
those that came one by one, `/health` answers within a second. Ends with 1 where a promise is broken.

    python benchmarks/chaos.py BUNDLE --seconds 120

BUNDLE needs a router. The thinker of `staged` is an endpoint of this process that answers by itself after a moment.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

LONGEST_START = 300
THOUGHT = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "It is easy."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 20, "completion_tokens": 4},
}
TEXTS = ("Add 12 and 31.", "List the files of this folder.", "Ann is 31 and lives in Rome.", "What is 7 times 8?")


@dataclass
class Storm:
    """What happened.

    Attributes:
        asked: greedy chats, and known: their answers, one by one.
        seconds: kind -> of every request that was answered.
        refused: seconds of every 429.
        late: requests whose end came more than a second after the deadline, with their seconds.
        health: seconds of every /health.
        memory: (seconds since the begin, bytes of the server).
        lag: seconds by which the clients' processes themselves woke too late: what the machine adds to every figure.
    """

    deadline: float
    asked: Sequence[dict[str, Any]]
    known: Sequence[str]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    refused: list[float] = field(default_factory=list)
    late: list[tuple[str, float]] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    lag: list[float] = field(default_factory=list)
    compared: int = 0
    differ: list[str] = field(default_factory=list)

    def note(self, kind: str, status: str, seconds: float) -> None:
        self.statuses[status] += 1
        if status == "429":
            self.refused.append(seconds)
        elif status != "left":
            self.seconds.setdefault(kind, []).append(seconds)
        if seconds > self.deadline + 1:
            self.late.append((kind, seconds))

    def compare(self, body: dict[str, Any], text: str) -> None:
        """Holds an answer against the one that was given alone."""
        asked = {key: value for key, value in body.items() if key != "stream"}
        expected = self.known[self.asked.index(asked)]
        self.compared += 1
        if text != expected:
            self.differ.append(f"{asked} -> {text!r}, not {expected!r}")

    def add(self, other: Storm) -> None:
        """What another process's clients saw."""
        for kind, seconds in other.seconds.items():
            self.seconds.setdefault(kind, []).extend(seconds)
        self.statuses += other.statuses
        self.refused += other.refused
        self.late += other.late
        self.lag += other.lag
        self.compared += other.compared
        self.differ += other.differ

    @property
    def growth(self) -> float:
        """Of the memory's peak, from the second quarter of the time to the last."""
        quarter = self.memory[-1][0] / 4
        early = max(size for when, size in self.memory if quarter <= when < 2 * quarter)
        return max(size for when, size in self.memory if when >= 3 * quarter) / early - 1


@contextmanager
def thinker(seconds: float) -> Iterator[str]:
    """An OpenAI-compatible endpoint that writes the same thought each time."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(seconds)
            body = json.dumps(THOUGHT).encode()
            with suppress(OSError):
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def server(bundle: Path, arguments: Sequence[str], log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`polymerge serve` in a process of its own, which must end by itself on SIGTERM."""
    command = [
        sys.executable,
        "-m",
        "polymerge",
        "serve",
        str(bundle),
        "--engine",
        "transformers",
        "--port",
        "0",
        "--json",
        "--quiet",
        *arguments,
    ]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {log.read_text()}")
        yield json.loads(line)["url"], psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LONGEST_START)


def questions(experts: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """Greedy chats whose answers are known beforehand."""
    models = [*experts, "average", f"{experts[0]}:0.6+{experts[-1]}:0.4"]
    return [
        {"model": m, "messages": [{"role": "user", "content": t}], "temperature": 0, "max_tokens": tokens}
        for m in models
        for t in TEXTS
    ]


def drawn(draw: random.Random, known: Sequence[dict[str, Any]]) -> tuple[str, str, dict[str, Any]]:
    """A kind of request, its path and its body."""
    kind = draw.choice(["chat", "stream", "auto", "staged", "prompts", "embeddings", "route"])
    asked = draw.choice(known)
    texts = [f"{draw.choice(TEXTS)} {draw.randrange(10**6)}" for _ in range(draw.randrange(1, 40))]
    if kind == "embeddings":
        return kind, "/v1/embeddings", {"input": texts}
    if kind == "route":
        return kind, "/v1/route", {"input": texts}
    if kind == "prompts":
        body = {"model": asked["model"], "prompt": texts[:12], "max_tokens": 8, "temperature": 0}
        return kind, "/v1/completions", body
    if kind in ("auto", "staged"):
        turn = [{"role": "user", "content": texts[0]}]
        return kind, "/v1/chat/completions", {"model": kind, "messages": turn, "max_tokens": 12, "temperature": 0}
    return kind, "/v1/chat/completions", asked | ({"stream": True} if kind == "stream" else {})


def text_of(kind: str, answer: httpx2.Response) -> str:
    """The text of a whole or a streamed chat."""
    if kind == "chat":
        return str(answer.json()["choices"][0]["message"]["content"])
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    chunks = [json.loads(one) for one in events]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", ()))


async def client(number: int, asking: httpx2.AsyncClient, until: float, storm: Storm, leave: float) -> None:
    """One client: asks, and now and then hangs up."""
    draw = random.Random(number)
    while time.monotonic() < until:
        kind, path, body = drawn(draw, storm.asked)
        patience = draw.uniform(0.05, 4.0) if draw.random() < leave else None
        began = time.monotonic()
        try:
            answer = await asyncio.wait_for(asking.post(path, json=body), patience)
        except TimeoutError:
            storm.note(kind, "left", time.monotonic() - began)
            continue
        except httpx2.HTTPError as error:
            storm.note(kind, type(error).__name__, time.monotonic() - began)
            continue
        failed = kind == "stream" and answer.status_code == 200 and '"error"' in answer.text
        status = "error event" if failed else str(answer.status_code)
        storm.note(kind, status, time.monotonic() - began)
        if status == "200" and kind in ("chat", "stream"):
            storm.compare(body, text_of(kind, answer))
        if status == "429":
            await asyncio.sleep(draw.uniform(0.2, 1.0))


def watch(url: str, process: psutil.Process, began: float, until: float, storm: Storm) -> None:
    """/health by connections of its own, from a thread of its own, and the server's memory."""
    while time.monotonic() < until:
        storm.memory.append((time.monotonic() - began, process.memory_info().rss))
        asked = time.monotonic()
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            status = 0
        connection.close()
        storm.health.append(time.monotonic() - asked if status == 200 else float("inf"))
        time.sleep(0.5)


async def notice_lag(until: float, storm: Storm) -> None:
    while time.monotonic() < until:
        asked = time.monotonic()
        await asyncio.sleep(0.05)
        storm.lag.append(time.monotonic() - asked - 0.05)


async def half_open(url: str, count: int, start: float, until: float) -> int:
    """Connections with half a header, each opened again when the server closes it. Returns how often that was."""
    host, _, port = url.removeprefix("http://").partition(":")
    opened = 0

    async def one() -> None:
        nonlocal opened
        while time.monotonic() < until:
            with suppress(OSError, TimeoutError):
                reader, writer = await asyncio.open_connection(host, int(port))
                opened += 1
                writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Half: ")
                with suppress(OSError, TimeoutError):
                    await asyncio.wait_for(reader.read(1), max(0.1, until - time.monotonic()))
                writer.close()

    await asyncio.sleep(max(0.0, start - time.monotonic()))
    await asyncio.gather(*[one() for _ in range(count)])
    return opened


async def clients(url: str, numbers: range, until: float, storm: Storm, leave: float) -> Storm:
    """Many clients of one process."""
    lagging = asyncio.create_task(notice_lag(until, storm))
    unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=len(numbers))
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=unlimited) as asking:
        await asyncio.gather(*[client(n, asking, until, storm, leave) for n in numbers])
    await lagging
    return storm


def clients_apart(url: str, numbers: range, until: float, storm: Storm, leave: float) -> Storm:
    """`clients` in a process of its own."""
    return asyncio.run(clients(url, numbers, until, storm, leave))


async def run(
    url: str, process: psutil.Process, options: argparse.Namespace, pool: ProcessPoolExecutor
) -> tuple[Storm, int]:
    """Answers one by one, then the storm: its clients in processes of their own, as each would be a bottleneck."""
    async with httpx2.AsyncClient(base_url=url, timeout=600) as alone:
        models = [one["id"] for one in (await alone.get("/v1/models")).json()["data"]]
        experts = [name for name in models if name not in ("auto", "average", "staged")]
        asked = questions(experts, options.tokens)
        known = [text_of("chat", await alone.post("/v1/chat/completions", json=body)) for body in asked]
    storm, began = Storm(options.deadline, asked, known), time.monotonic()
    until, loop = began + options.seconds, asyncio.get_running_loop()
    shares = [range(first, options.clients, options.processes) for first in range(options.processes)]
    blank = Storm(options.deadline, asked, known)  # each process has its own
    seen = [loop.run_in_executor(pool, clients_apart, url, share, until, blank, options.leave) for share in shares]
    watcher = asyncio.create_task(asyncio.to_thread(watch, url, process, began, until, storm))
    holders = asyncio.create_task(half_open(url, options.half_open, began + options.seconds / 2, until))
    for part in await asyncio.gather(*seen):
        storm.add(part)
    await watcher
    return storm, await holders


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def verdicts(storm: Storm) -> dict[str, tuple[str, bool]]:
    """Promise -> (what was measured, whether it was kept)."""
    refused, health = percentile(storm.refused, 0.99), max(storm.health)
    broken = {s: n for s, n in storm.statuses.items() if s not in ("200", "429", "504", "error event", "left")}
    worst = max((seconds for _, seconds in storm.late), default=0.0)
    return {
        "p99 of a 429 under 1 s": (f"{refused:.2f} s of {len(storm.refused)}", refused < 1),
        "no deadline missed by more than 1 s": (f"{len(storm.late)}, worst {worst:.1f} s", not storm.late),
        "memory flat": (f"{storm.growth:+.1%}", storm.growth < 0.05),
        "greedy answers as one by one": (f"{len(storm.differ)} of {storm.compared} differ", not storm.differ),
        "/health within 1 s": (f"longest {health:.2f} s of {len(storm.health)}", health < 1),
        "nothing else": (str(broken or "none"), not broken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the storm")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4, help="that the clients are shared out to")
    parser.add_argument("--leave", type=float, default=0.4, help="share of requests whose client hangs up")
    parser.add_argument("--half-open", type=int, default=160)
    parser.add_argument("--deadline", type=float, default=20.0, help="the server's --timeout")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--waiting", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=12, help="of a chat's answer")
    parser.add_argument("--device", help="the server's, such as cpu")
    parser.add_argument("--log", type=Path, default=Path("chaos.log"), help="the server's")
    parser.add_argument("--output", type=Path, default=Path("benchmark-chaos.json"))
    options = parser.parse_args()
    with thinker(0.3) as endpoint:
        limits = [
            "--timeout",
            str(options.deadline),
            "--max-rows",
            str(options.rows),
            "--max-waiting",
            str(options.waiting),
        ]
        limits += ["--device", options.device] if options.device else []
        staged = ["--thinker", endpoint, "--model", "scripted", "--policy", "always"]
        with server(options.bundle, [*limits, *staged, "--no-probe"], options.log) as (url, process):
            with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
                storm, opened = asyncio.run(run(url, process, options, pool))
            ending = time.monotonic()
        ended = time.monotonic() - ending
    kept = verdicts(storm)
    table = Table("promise", "measured", "kept", title=f"{options.clients} clients, {options.seconds:g} s")
    for promise, (measured, good) in kept.items():
        table.add_row(promise, measured, "yes" if good else "NO")
    console = Console(width=120)
    console.print(table)
    console.print(f"{dict(storm.statuses)}; {opened} half-open connections; the end took {ended:.1f} s;")
    late, latest = percentile(storm.lag, 0.99), max(storm.lag)
    console.print(f"the clients' processes woke too late by {late:.2f} s (p99), {latest:.2f} s at most")
    console.print(f"the log has {options.log.stat().st_size:,} bytes")
    for line in storm.differ[:5]:
        console.print(line, markup=False)
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "options": {name: str(value) for name, value in vars(options).items()},
        "statuses": storm.statuses,
        "half_open": opened,
        "seconds": {k: {"p50": percentile(v, 0.5), "p99": percentile(v, 0.99)} for k, v in storm.seconds.items()},
        "late": storm.late,
        "lag": {"p50": percentile(storm.lag, 0.5), "p99": percentile(storm.lag, 0.99), "max": max(storm.lag)},
        "promises": {promise: {"measured": measured, "kept": good} for promise, (measured, good) in kept.items()},
    }
    options.output.write_text(json.dumps(report, indent=2))
    raise SystemExit(0 if all(good for _, good in kept.values()) else 1)


if __name__ == "__main__":
    main()
