"""What prompts cost a server: a system prompt that requests share, and a long one that arrives among running answers.

    python benchmarks/serve_prompts.py BUNDLE --output benchmark-serve-prompts.json

Each server is a process of its own, on the same bundle and cores:

    as it is                as `polymerge serve` starts
    pieces of 512, 128      with `--chunk-tokens`
    nothing remembered      with `--prefix-tokens 0`
    whole prompts           nothing remembered, and prompts read in one go, however long the running answers wait
    before                  `--before FOLDER`: the server of another checkout of polymerge, as it starts

Two loads. `shared`: clients that ask short questions, with a system prompt of about 500 tokens before each and without
one. `arrival`: streams that run while a prompt of about 2,000 tokens arrives; the delays between their pieces until
that one has its first token, and how long it waits for it. Text is made up; only times mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from serve import BEFORE, _p95, server, serving, streamed

WAYS: dict[str, list[str]] = {
    "as it is": [],
    "pieces of 512": ["--chunk-tokens", "512"],
    "pieces of 128": ["--chunk-tokens", "128"],
    "nothing remembered": ["--prefix-tokens", "0"],
    "whole prompts": ["--prefix-tokens", "0", "--chunk-tokens", "100000"],
}
TEXT = "the of and a to in is you that it he was for on are as with his they I at be this have from or one had by"
WORDS = tuple(TEXT.split())  # each a token
SYSTEM_TOKENS, LONG_TOKENS, ANSWER_TOKENS = 500, 2000, 24
RUNNING, RUNNING_TOKENS, SPARE = 4, 1500, 2.0


@dataclass
class Stream:
    """When the pieces of one answer came, in seconds since it was asked for."""

    times: list[float] = field(default_factory=list)
    tokens: int = 0


def words(count: int, seed: int) -> str:
    """About as many tokens as words."""
    return " ".join(WORDS[(number * number + 7 * seed + number // 11) % len(WORDS)] for number in range(count))


async def ask(client: httpx2.AsyncClient, url: str, expert: str, prompt: str, tokens: int, stream: Stream) -> None:
    body = {
        "model": expert, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began = time.perf_counter()
    async for chunk in streamed(client, url, body):
        stream.tokens = (chunk.get("usage") or {}).get("completion_tokens", stream.tokens)
        if any(choice["text"] for choice in chunk["choices"]):
            stream.times.append(time.perf_counter() - began)


async def shared(
    url: str, experts: list[str], *, system: bool, requests: int, clients: int, seed: int
) -> dict[str, Any]:
    """Short questions to one expert after the other, each expert's with the same beginning."""
    beginning = words(SYSTEM_TOKENS, seed) + "\n\n" if system else ""
    streams = [Stream() for _ in range(requests)]
    left = iter(range(requests))

    async def one(client: httpx2.AsyncClient) -> None:
        for number in left:
            prompt = beginning + words(20, 1000 + seed + number)
            await ask(client, url, experts[number % len(experts)], prompt, ANSWER_TOKENS, streams[number])

    async with httpx2.AsyncClient(timeout=600) as client:
        began = time.perf_counter()
        await asyncio.gather(*[one(client) for _ in range(clients)])
        seconds = time.perf_counter() - began
    first = [1e3 * stream.times[0] for stream in streams]
    return {
        "tokens_per_second": sum(stream.tokens for stream in streams) / seconds,
        "first_token_ms": {"p50": statistics.median(first), "p95": _p95(first)},
    }


async def arrival(url: str, experts: list[str], seed: int) -> dict[str, Any]:
    """A long prompt among answers that run."""
    async with httpx2.AsyncClient(timeout=600) as client:
        running = [Stream() for _ in range(RUNNING)]
        began = time.perf_counter()
        tasks = [
            asyncio.create_task(
                ask(client, url, experts[n % len(experts)], words(30, seed + n), RUNNING_TOKENS, running[n])
            )
            for n in range(RUNNING)
        ]
        while not all(len(stream.times) > 8 for stream in running):
            for task in tasks:
                if task.done():
                    task.result()  # raises what it failed with
            await asyncio.sleep(0.02)
        long, asked = Stream(), time.perf_counter() - began
        await ask(client, url, experts[0], words(LONG_TOKENS, seed), 1, long)
        until = asked + long.times[0]
        await asyncio.sleep(SPARE)  # the delay in which it came has an end as well
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    before = [1e3 * gap for stream in running for gap in gaps(stream, 0, asked)]
    while_read = [1e3 * gap for stream in running for gap in gaps(stream, asked, until)]
    return {
        "first_token_ms": 1e3 * long.times[0],
        "delay_before_ms": {"p50": statistics.median(before), "p95": _p95(before)},
        "delay_ms": {"p50": statistics.median(while_read), "p95": _p95(while_read), "max": max(while_read)},
    }


def gaps(stream: Stream, begin: float, end: float) -> list[float]:
    """Between pieces, of those that overlap a time."""
    pairs = zip(stream.times, stream.times[1:], strict=False)
    return [later - earlier for earlier, later in pairs if later > begin and earlier < end]


def measured(way: str, options: argparse.Namespace, experts: list[str]) -> dict[str, Any]:
    command = serving(options.bundle, options.before) if way == BEFORE else [*serving(options.bundle), *WAYS[way]]
    with server(command, options.cores) as (url, _):
        asyncio.run(shared(url, experts, system=False, requests=3, clients=3, seed=99))  # warms caches and allocators
        load = {"requests": options.requests, "clients": options.clients}
        return {
            "without": asyncio.run(shared(url, experts, system=False, seed=1, **load)),
            "with": asyncio.run(shared(url, experts, system=True, seed=2, **load)),
            "arrival": [asyncio.run(arrival(url, experts, seed)) for seed in range(options.arrivals)],
        }


def print_table(systems: dict[str, Any]) -> None:
    table = Table(title="milliseconds, p50 / p95; short answers; a long prompt among running answers")
    for column in ("server", "tokens/s", "first token", "with 500 shared: tokens/s", "first token",
                   "delay of a token before", "while 2,000 are read", "longest", "their first token"):  # fmt: skip
        table.add_column(column, justify="left" if column == "server" else "right")
    for way, found in systems.items():
        arrivals = found["arrival"]

        def mean(name: str, part: str, arrivals: Any = arrivals) -> float:
            return float(statistics.mean(one[name][part] for one in arrivals))

        table.add_row(
            way,
            *(cell for load in ("without", "with") for cell in (
                f"{found[load]['tokens_per_second']:.1f}",
                f"{found[load]['first_token_ms']['p50']:.0f} / {found[load]['first_token_ms']['p95']:.0f}",
            )),
            f"{mean('delay_before_ms', 'p50'):.0f} / {mean('delay_before_ms', 'p95'):.0f}",
            f"{mean('delay_ms', 'p50'):.0f} / {mean('delay_ms', 'p95'):.0f}",
            f"{max(one['delay_ms']['max'] for one in arrivals):.0f}",
            f"{statistics.mean(one['first_token_ms'] for one in arrivals):.0f}",
        )  # fmt: skip
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout of polymerge, measured too")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--arrivals", type=int, default=3, help="long prompts, one after the other")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="threads of the server")
    parser.add_argument("--output", type=Path, default=Path("benchmark-serve-prompts.json"))
    options = parser.parse_args()
    experts = sorted(path.name for path in (options.bundle / "experts").iterdir())
    systems: dict[str, Any] = {}
    for way in [*options.ways, *([BEFORE] if options.before else [])]:
        systems[way] = measured(way, options, experts)
        options.output.write_text(json.dumps(systems, indent=1) + "\n")
        print(f"{way}: {json.dumps(systems[way])}", flush=True)
    print_table(systems)


if __name__ == "__main__":
    main()
