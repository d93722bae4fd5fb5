"""Serving three experts to 1, 8 and 32 clients at once: ours against two other ways to serve the same answers.

    polymerge          one server with the bundle: rows of all experts in one running batch
    one at a time      the same server with room for one answer
    three servers      the dense experts, each behind a server of its own (the same one), and clients that know which
    vLLM               the bundle's export, with `--vllm-python`: the python of an environment that has vLLM

The demo's experts and held-out requests; greedy answers, compared with those of the offline engine. Every server is a
process of its own, whose peak memory (its children's too) is read when the load is over. `--peer NAME=URL` adds a
server that runs already, whose models have the experts' names; `--before FOLDER` the server of another checkout of
polymerge; `--sampled` draws the answers at a temperature of 1. Steps are the first token's p50 in the time in which
every client gets one token. Long prompts and shared ones: `serve_prompts.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from chosen import demo_base, demo_experts
from polymerge import export_dense, merge
from polymerge.demo.skills import demo_skills
from polymerge.demo.train import format_prompt
from polymerge.engine import GenerateRequest
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.vllm.server import VllmServer
from polymerge.export import plan_vllm, write_vllm
from polymerge.host import cache_folder

OURS, ALONE, DENSE, VLLM, BEFORE = "polymerge", "one at a time", "three servers", "vLLM", "before"
TOKENS = 48
# vLLM on CPUs: GB for keys and values (the load needs a part of it), a context that holds the load, and no prefix
# cache, because every round asks the same prompts again.
VLLM_CACHE = "1"
VLLM_ARGUMENTS = ["--max-model-len", "1024", "--no-enable-prefix-caching"]
LONGEST_START = 180
# expert -> where it is asked, and the fields of a request that name it there
Models = dict[str, tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Asked:
    """One request of the load. `expert` is the model's name."""

    expert: str
    prompt: str


@dataclass(frozen=True)
class Answered:
    """What came back. Seconds since the request was sent."""

    text: str
    tokens: int
    first: float
    whole: float


def bundle_folder() -> Path:
    """The demo's bundle, and its dense experts beside it (trained where the cache lacks them)."""
    _, experts = demo_experts(demo_base())
    folder = cache_folder() / "bench-serve"
    merge({"experts": experts, "method": "published", "embeddings": "average"}, folder / "bundle", overwrite=True)
    for name in experts:
        export_dense(folder / "bundle", name, folder / name, overwrite=True)
    return folder


def load(count: int) -> list[Asked]:
    """Held-out requests of all skills in turn."""
    skills = demo_skills(train=1, test=count)
    rows = [Asked(skill.name, format_prompt(skill.test[n].prompt)) for n in range(count) for skill in skills]
    return rows[:count]


@contextmanager
def server(arguments: Sequence[str], threads: int) -> Iterator[tuple[str, int]]:
    """A server process: its URL and its process number."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a server did not start: {' '.join(arguments)}")
        yield json.loads(line)["url"], process.pid
    finally:
        process.terminate()
        process.wait(LONGEST_START)


def named(url: str, experts: Iterable[str]) -> Models:
    """Experts that are models of one server, by their own names."""
    return {name: (url, {"model": name}) for name in experts}


def serving(bundle: Path, before: Path | None = None) -> list[str]:
    """The command of our server, or of another checkout's, whose engine may be its only one."""
    run = ["env", f"PYTHONPATH={before / 'src'}"] if before else []
    chooses = before is None or "engine: Annotated" in (before / "src/polymerge/cli/serve.py").read_text()
    engine = ["--engine", "transformers"] if chooses else []
    return [*run, sys.executable, "-m", "polymerge", "serve", str(bundle), *engine, "--port", "0", "--json", "--quiet"]


@contextmanager
def system(
    name: str, bundle: Path, experts: Sequence[str], cores: int, before: Path | None
) -> Iterator[tuple[Models, list[int]]]:
    """A way to serve, and the processes behind it."""
    command = serving(bundle, before if name == BEFORE else None)
    with ExitStack() as stack:
        if name == DENSE:
            dense_command = [sys.executable, __file__, "--dense"]
            each = max(1, cores // len(experts))
            folders = [str(bundle.with_name(expert)) for expert in experts]
            started = [stack.enter_context(server([*dense_command, folder], each)) for folder in folders]
            models: Models = {
                name: (url, {"model": "average"}) for name, (url, _) in zip(experts, started, strict=True)
            }
            yield models, [pid for _, pid in started]
        else:
            more = ["--max-rows", "1", "--max-waiting", "1000"] if name == ALONE else []
            url, pid = stack.enter_context(server([*command, *more], cores))
            yield named(url, experts), [pid]


@contextmanager
def vllm_system(
    bundle: Path, python: str, experts: Sequence[str], extra: Sequence[str]
) -> Iterator[tuple[Models, list[int]]]:
    """vLLM on what the bundle's export to it wrote."""
    folder = bundle.with_name("vllm")
    write_vllm(plan_vllm(bundle), folder, device="cpu", overwrite=True)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", VLLM_CACHE)
    say = partial(print, file=sys.stderr)
    with VllmServer(folder, python=python, extra=[*VLLM_ARGUMENTS, *extra], say=say) as server:
        yield named(server.url, experts), [server.pid]


async def streamed(client: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a completion."""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])


async def ask(client: httpx2.AsyncClient, url: str, named: dict[str, Any], asked: Asked, seed: int | None) -> Answered:
    """One streamed answer: greedy, or drawn with a seed."""
    body = {
        **named, "prompt": asked.prompt, "max_tokens": TOKENS, "stream": True,
        "stream_options": {"include_usage": True},
        **({"temperature": 0} if seed is None else {"temperature": 1, "seed": seed}),
    }  # fmt: skip
    began, first, text, tokens = time.perf_counter(), 0.0, "", 0
    async for chunk in streamed(client, url, body):
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        for choice in chunk["choices"]:
            text += choice["text"]
            first = first or time.perf_counter() - began
    return Answered(text, tokens, first, time.perf_counter() - began)


async def drive(
    models: Models, rows: Sequence[Asked], clients: int, sampled: bool = False, headers: Mapping[str, str] = {}
) -> tuple[list[Answered], float]:
    """The rows, asked by so many clients that each wait for their answer. Returns the answers and the seconds."""
    answered: dict[int, Answered] = {}
    left = iter(enumerate(rows))

    async def one(client: httpx2.AsyncClient) -> None:
        for number, row in left:
            answered[number] = await ask(client, *models[row.expert], row, number if sampled else None)

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)  # llama.cpp's server drops used ones
    async with httpx2.AsyncClient(timeout=600, limits=limits, headers=headers) as client:
        began = time.perf_counter()
        await asyncio.gather(*[one(client) for _ in range(clients)])
        seconds = time.perf_counter() - began
    return [answered[number] for number in range(len(rows))], seconds


def offline(bundle: Path, rows: Sequence[Asked], dense: bool) -> list[str]:
    """Greedy answers of the offline engine, of the bundle or of every dense expert."""
    if not dense:
        requests = [GenerateRequest(row.prompt, row.expert, TOKENS) for row in rows]
        return [answer.text for answer in HFEngine.from_bundle(bundle).generate(requests)]
    texts = [""] * len(rows)
    for expert in {row.expert for row in rows}:
        engine = HFEngine.from_checkpoint(str(bundle.with_name(expert)))
        numbers = [number for number, row in enumerate(rows) if row.expert == expert]
        answers = engine.generate([GenerateRequest(rows[number].prompt, None, TOKENS) for number in numbers])
        for number, answer in zip(numbers, answers, strict=True):
            texts[number] = answer.text
    return texts


def measured(answers: Sequence[Answered], seconds: float, expected: Sequence[str]) -> dict[str, Any]:
    """What a table row needs. Milliseconds."""
    first, whole = [answer.first * 1e3 for answer in answers], [answer.whole * 1e3 for answer in answers]
    return {
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
        "first_token_ms": {"p50": statistics.median(first), "p95": _p95(first)},
        "answer_ms": {"p50": statistics.median(whole), "p95": _p95(whole)},
        "same_as_offline": sum(a.text == b for a, b in zip(answers, expected, strict=True)) / len(answers),
    }


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def peak_memory(processes: Sequence[int]) -> int:
    """Bytes: the largest resident sizes of the processes and of their children, added."""
    total = 0
    for pid in processes:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
        children = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
        total += peak_memory([int(child) for pids in children for child in pids])
    return total


def serve_dense(folder: str) -> None:
    """One dense expert behind the same server; any model name is it."""
    from polymerge.cli.logs import hush_libraries
    from polymerge.engine.local.batching import BatchingEngine
    from polymerge.serve.app import create_app
    from polymerge.serve.run import listener, run_app
    from polymerge.serve.settings import ServeSettings

    hush_libraries()
    engine = BatchingEngine(HFEngine.from_checkpoint(folder))
    app = create_app(engine)  # its only model is "average", a plain model itself
    place = listener("127.0.0.1", 0)
    told = json.dumps({"url": f"http://127.0.0.1:{place.getsockname()[1]}"})
    run_app(app, place, ServeSettings(drain_seconds=5), lambda stop: print(told, flush=True))
    engine.close(5)


def print_table(result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['requests']} requests, experts mixed, {'drawn' if result['sampled'] else 'greedy'}, up to "
        f"{TOKENS} tokens; times are p50 / p95"
    )
    columns = ("system", "clients", "tokens/s", "first token, ms", "steps", "answer, ms", "as offline", "peak memory")
    for column in columns:
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, figures in result["systems"].items():
        for clients, row in figures["clients"].items():
            table.add_row(
                name, str(clients), f"{row['tokens_per_second']:.1f}",
                f"{row['first_token_ms']['p50']:.0f} / {row['first_token_ms']['p95']:.0f}",
                f"{row['first_token_steps']:.2f}",
                f"{row['answer_ms']['p50']:.0f} / {row['answer_ms']['p95']:.0f}",
                "" if result["sampled"] else f"{row['same_as_offline']:.1%}",
                f"{figures['peak_memory'] / 1e9:.2f} GB" if figures["peak_memory"] else "",
            )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--systems", nargs="*", default=[OURS, ALONE, DENSE], choices=[OURS, ALONE, DENSE])
    parser.add_argument("--bundle", type=Path, help="the demo's, made before; then neither dense experts nor vLLM")
    parser.add_argument("--vllm-python", metavar="PATH", help="measure vLLM too, with this python")
    parser.add_argument("--vllm-arg", action="append", default=[], help="a further argument of `vllm serve`")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout of polymerge, measured too")
    parser.add_argument("--sampled", action="store_true", help="answers are drawn, not greedy")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="threads of one server")
    parser.add_argument("--output", type=Path, default=Path("benchmark-serve.json"))
    parser.add_argument("--dense", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dense:
        serve_dense(options.dense)
        return
    if options.bundle and (DENSE in options.systems or options.vllm_python):
        parser.error(f"--bundle: with --systems that have no {DENSE!r}, and without --vllm-python")
    bundle, rows = options.bundle or bundle_folder() / "bundle", load(options.requests)
    experts = sorted({row.expert for row in rows})
    expected = {dense: offline(bundle, rows, dense) for dense in {False, DENSE in options.systems}}
    systems: dict[str, Any] = {}
    versions = {name: version(name) for name in ("polymerge", "torch", "transformers", "uvicorn")}
    loaded = partial(_loaded, rows=rows, clients=options.clients, sampled=options.sampled)
    for name in [*options.systems, *([BEFORE] if options.before else [])]:
        with system(name, bundle, experts, options.cores, options.before) as (models, processes):
            systems[name] = loaded(models, expected=expected[name == DENSE])
            systems[name]["peak_memory"] = peak_memory(processes)
    if options.vllm_python:
        with vllm_system(bundle, options.vllm_python, experts, options.vllm_arg) as (models, processes):
            systems[VLLM] = loaded(models, expected=expected[False])
            systems[VLLM]["peak_memory"] = peak_memory(processes)
            versions[VLLM] = httpx2.get(f"{models[experts[0]][0]}/version").json()["version"]
    for peer in options.peer:
        name, _, url = peer.partition("=")
        systems[name] = loaded(named(url, experts), expected=expected[False])
        systems[name]["peak_memory"] = None
    result = {
        "requests": len(rows),
        "sampled": options.sampled,
        "systems": systems,
        "cores": options.cores,
        "versions": versions,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)


def _loaded(
    models: Models, *, rows: Sequence[Asked], clients: Sequence[int], sampled: bool, expected: Sequence[str]
) -> dict[str, Any]:
    asyncio.run(drive(models, rows[:3], 3, sampled))  # the first requests warm caches and allocators
    rows_of = {count: measured(*asyncio.run(drive(models, rows, count, sampled)), expected) for count in clients}
    for count, row in rows_of.items():  # the time in which every client gets a token: the same on a busy machine
        row["first_token_steps"] = row["first_token_ms"]["p50"] / 1e3 * row["tokens_per_second"] / count
    return {"clients": rows_of}


if __name__ == "__main__":
    main()
