"""Locust users who stream answers from any OpenAI-compatible server, one model after the other.

Beside whole answers, Locust's tables show two events of their own: the time to the first token, and milliseconds a
token from then on. When the test ends, it prints the tokens a second of all users. Needs only `pip install locust`.

    locust -f benchmarks/locustfile.py --headless -u 8 -r 8 -t 60s -H http://127.0.0.1:8000 --prompts prompts.jsonl

Knows no experts: what it asks for are names of models.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import requests
from locust import User, events, task
from locust.env import Environment

ANSWER, FIRST, EACH = "whole answer", "first token", "each further token"
QUESTIONS = ("What is 12 times 31?", "List all files over 10 MB.", "Name three colours as JSON.")
# models of polymerge that are no expert
OTHERS = ("auto", "average", "staged")


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--prompts", help='JSON lines {"model": ..., "prompt": ...}; by default a few for every expert')
    parser.add_argument("--max-tokens", type=int, default=48)


@events.init.add_listener
def read_rows(environment: Environment, **_: Any) -> None:
    """All users take from one row of requests, so that models stay mixed."""
    file, url = environment.parsed_options.prompts, f"{environment.host}/v1/models"
    try:
        if file:
            lines = Path(file).read_text(encoding="utf-8").split("\n")  # polymerge's reader may not be installed here
            rows = [json.loads(line) for line in lines if line.strip()]
        else:
            listed = requests.get(url, headers=_headers(), timeout=60).json()["data"]
            models = [model["id"] for model in listed if model["id"] not in OTHERS]
            rows = [{"model": model, "prompt": question} for question in QUESTIONS for model in models]
    except (OSError, ValueError, KeyError) as error:  # requests' own are OSErrors
        raise SystemExit(f"{file or url}: {error}") from None
    if not rows:
        raise SystemExit(f"{file or url}: there is nothing to ask")
    environment.polymerge_rows = itertools.cycle(rows)


class Client(User):
    """Asks, reads the whole stream, asks again."""

    def on_start(self) -> None:
        self._session = requests.Session()
        self._session.headers.update(_headers())

    @task
    def answer(self) -> None:
        row = next(self.environment.polymerge_rows)
        body = {
            **row, "max_tokens": self.environment.parsed_options.max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        began, first, tokens = time.perf_counter(), 0.0, 0
        try:
            with self._session.post(f"{self.host}/v1/completions", json=body, stream=True, timeout=600) as response:
                response.raise_for_status()
                for chunk in _chunks(response):
                    first = first or time.perf_counter()
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        except (requests.RequestException, RuntimeError) as error:
            self._fire(ANSWER, time.perf_counter() - began, 0, error)
            return
        ended = time.perf_counter()
        if not tokens:
            self._fire(ANSWER, ended - began, 0, RuntimeError("no token came"))
            return
        self._fire(FIRST, first - began, 1)
        if tokens > 1:
            self._fire(EACH, (ended - first) / (tokens - 1), tokens - 1)
        self._fire(ANSWER, ended - began, tokens)

    def _fire(self, name: str, seconds: float, tokens: int, error: Exception | None = None) -> None:
        """One event; its length, bytes to Locust, is in tokens."""
        self.environment.events.request.fire(
            request_type="stream", name=name, response_time=1e3 * seconds, response_length=tokens, exception=error,
            context={},
        )  # fmt: skip


@events.test_stop.add_listener
def say_tokens(environment: Environment, **_: Any) -> None:
    """Tokens a second of the whole test, of all workers."""
    stats = environment.stats.get(ANSWER, "stream")
    seconds = (stats.last_request_timestamp or 0) - stats.start_time
    if stats.num_requests and seconds > 0:
        print(f"{stats.total_content_length / seconds:.1f} tokens/s over {stats.num_requests} answers")


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _chunks(response: requests.Response) -> Any:
    """The JSON events of a stream.

    Raises:
        RuntimeError: the server breaks off with an error.
    """
    for line in response.iter_lines():
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(chunk["error"].get("message", "the server broke off"))
        yield chunk
