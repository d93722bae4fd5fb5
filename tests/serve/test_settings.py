"""The limits of a server: one home, checked once, the same in Python, on the command line and in the docs."""

import asyncio
import inspect
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from polymerge.cli.main import app
from polymerge.cli.serve import serve
from polymerge.engine.admission import Limits
from polymerge.engine.local.batching import BatchingEngine
from polymerge.errors import EngineBusyError, PolymergeError
from polymerge.serve.app import create_app
from polymerge.serve.settings import ServeSettings
from polymerge.serve.stages import Stages
from polymerge.staged import Question
from tests.serve.conftest import Staged, running

DOCS = Path(__file__).parents[2] / "docs" / "serve.md"
LIMITS = [limit for limit in fields(ServeSettings) if limit.metadata]
OPTIONS = {
    "max_tokens": "max_tokens",
    "max_body": "max_body_bytes",
    "max_rows": "max_rows",
    "max_waiting": "max_waiting",
    "cache_tokens": "cache_tokens",
    "chunk_tokens": "chunk_tokens",
    "prefix_tokens": "prefix_tokens",
    "rate_limit": "requests_per_minute",
    "timeout": "seconds",
    "drain": "drain_seconds",
    "margin": "margin",
}


@pytest.mark.parametrize("name", [limit.name for limit in LIMITS])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_limit_that_cannot_be_one_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(PolymergeError, match=f"^{name}: must be at least [01]"):
        ServeSettings(**{name: value})


def test_every_number_is_a_limit_with_bounds() -> None:
    numbers = {f.name for f in fields(ServeSettings) if type(f.default) in (int, float)}
    assert numbers | {"requests_per_minute"} == {limit.name for limit in LIMITS}
    with pytest.raises(PolymergeError, match=r"^margin: must be at least 0 and at most 1, not 20$"):
        ServeSettings(margin=20)


def test_the_engines_limits_are_the_settings_and_their_defaults_its_own() -> None:
    assert ServeSettings().limits == Limits()
    given = ServeSettings(max_rows=3, max_waiting=4, cache_tokens=500, prompt_tokens=60, prefix_tokens=0).limits
    assert given == Limits(max_rows=3, max_waiting=4, cache_tokens=500, prompt_tokens=60, prefix_tokens=0)


def test_the_command_line_has_the_settings_defaults() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(serve).parameters.items()}
    for option, name in OPTIONS.items():
        assert defaults[option] == getattr(ServeSettings(), name)


def test_every_option_reaches_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServeSettings] = []
    monkeypatch.setattr("polymerge.serve.run.serve", lambda bundle, **more: given.append(more["settings"]))
    values = {option: 1 + number for number, option in enumerate(OPTIONS) if option != "margin"} | {"margin": 0.5}
    words = [word for option, value in values.items() for word in (f"--{option.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(app, ["serve", "bundle", "--engine", "transformers", *words])
    assert result.exit_code == 0, result.output
    assert {option: getattr(given[0], name) for option, name in OPTIONS.items()} == values
    assert isinstance(
        CliRunner().invoke(app, ["serve", "bundle", "--engine", "transformers", "--margin", "2"]).exception,
        PolymergeError,
    )


def test_the_docs_list_every_limit_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:`--([\w-]+)`)? ?\| (\S+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    shown = {name: (option.replace("-", "_"), default) for name, option, default in rows}
    options = {name: option for option, name in OPTIONS.items()}
    assert shown == {
        limit.name: (options.get(limit.name, ""), "none" if limit.default is None else f"{limit.default:.10g}")
        for limit in LIMITS
    }


def test_a_body_that_does_not_come_in_time_is_a_408(engine: BatchingEngine) -> None:
    def slowly() -> Any:
        yield b'{"model": '
        threading.Event().wait(1.0)
        yield b'"e0"}'

    with running(create_app(engine, settings=ServeSettings(body_seconds=0.2)), engine) as server:
        url, kind = f"{server.url}/v1/completions", {"content-type": "application/json"}
        assert httpx2.post(url, content=slowly(), headers=kind).status_code == 408


def test_more_questions_than_may_wait_for_the_thinker_are_refused() -> None:
    begun, gate = threading.Event(), threading.Event()

    class Slow:
        def respond(self, questions: Sequence[Question], *, deadline: float | None = None) -> list[Staged]:
            begun.set()
            assert gate.wait(30)
            return [Staged(question.text) for question in questions]

    async def ask() -> list[str]:
        stages, due = Stages(Slow(), ServeSettings(max_questions=2)), time.monotonic() + 30
        first = asyncio.create_task(stages.ask(Question("w5"), due=due))
        assert await asyncio.to_thread(begun.wait, 30)
        others = [asyncio.create_task(stages.ask(Question(f"w{n}"), due=due)) for n in (6, 7)]
        await asyncio.sleep(0)
        with pytest.raises(EngineBusyError, match=r"^2 questions are waiting"):
            await stages.ask(Question("w8"), due=due)
        gate.set()
        return [(await answer).text for answer in (first, *others)]

    assert asyncio.run(ask()) == ["w5", "w6", "w7"]
