"""The plan of a run: what is counted is exact, what is timed is near, and no answer changes by it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from polymerge.compete import compete
from polymerge.compete.expected import SHARE, TIMED, Expected
from polymerge.engine import Generation
from polymerge.errors import ModelError
from polymerge.staged import Pipeline, Thought
from polymerge.staged.endpoint import EndpointThinker
from tests.compete.test_run import ALWAYS, Stopped, make_input, pipeline
from tests.staged.scripted import ScriptedEngine, ScriptedThinker


def test_tokens_and_rows_are_counted_and_the_answers_stay(tmp_path: Path) -> None:
    source, plans = make_input(tmp_path), list[Expected]()
    compete(pipeline(thinker=ScriptedThinker()), source, tmp_path / "bare.csv")
    thinker = ScriptedThinker()
    used = pipeline(thinker=thinker)
    summary = compete(used, source, tmp_path / "out.csv", max_new_tokens=10, on_plan=plans.append, memory_limit=2**50)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "bare.csv").read_bytes()
    [plan] = plans
    assert summary.to_json()["expected"] == asdict(plan)
    texts = [line.split(",")[1] for line in source.read_text().splitlines()[1:]]
    tokens = ALWAYS.thought_tokens
    scored = sum(bool(n % 3) for n in range(90))  # tokens of this engine are characters; choices are a, bb and ccc
    assert plan.read == sum(map(len, texts)) + 6 * scored + 90 * tokens
    assert (plan.rows, plan.written) == (90, 10 * (90 - scored))
    assert (plan.thoughts, plan.thought_tokens) == (90, 90 * tokens)
    assert plan.fits and plan.seconds is not None and plan.memory_limit == 2**50
    assert len(thinker.prompts) - 90 == 3 * -(-90 // SHARE)


class SlowEngine(ScriptedEngine):
    """A millisecond a prompt, and as much for each of sixteen tokens at most."""

    def generate(self, requests: Any) -> list[Generation]:
        counts = [min(16, request.max_new_tokens) for request in requests]
        time.sleep(0.001 * sum(1 + count for count in counts))
        return [Generation("w" * count, 1, count, "stop") for count in counts]


def test_the_seconds_are_about_those_of_the_run(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    rows = "".join(f"{n},question {n:03},generation,\n" for n in range(160))
    source.write_text("id,input,eval_type,answer_choices\n" + rows)
    plans: list[Expected] = []
    used = Pipeline(SlowEngine(), chat=False)
    compete(used, source, tmp_path / "out.csv", max_new_tokens=16, on_plan=plans.append, time_limit=0.5)
    assert plans[0].seconds == pytest.approx(160 * 0.017, rel=0.4)
    assert not plans[0].fits


def test_a_run_that_goes_on_plans_what_is_left(tmp_path: Path) -> None:
    source, seen = make_input(tmp_path), list[Expected]()

    def stop(step: Any) -> None:
        if step.phase == "answering" and 0 < step.done < step.total:
            raise Stopped

    with pytest.raises(Stopped):
        compete(pipeline(thinker=ScriptedThinker()), source, tmp_path / "out.csv", progress=stop)
    thinker = ScriptedThinker()
    compete(pipeline(thinker=thinker), source, tmp_path / "out.csv", on_plan=seen.append)
    assert 0 < seen[0].rows < 90 and seen[0].thoughts == 0 and thinker.prompts == []


def test_a_thinker_that_fails_is_planned_with_all_the_time_it_may_take(tmp_path: Path) -> None:
    seen: list[Expected] = []
    failing = ScriptedThinker(lambda prompt: Thought("", finish="failed", error="down"))
    compete(pipeline(thinker=failing), make_input(tmp_path), tmp_path / "o.csv", on_plan=seen.append, time_limit=100)
    assert seen[0].seconds is not None and 45 < seen[0].seconds < 60


def test_rows_that_cannot_be_timed_leave_the_time_open(tmp_path: Path) -> None:
    def write(prompt: str, expert: Any) -> str:
        raise ModelError("no")

    seen: list[Expected] = []
    used = Pipeline(ScriptedEngine(write), chat=False)
    compete(used, make_input(tmp_path, 9), tmp_path / "out.csv", on_error="skip", on_plan=seen.append)
    assert seen[0].seconds is None and seen[0].rows == 9


def test_few_rows_are_timed(tmp_path: Path) -> None:
    used = pipeline()
    compete(used, make_input(tmp_path, 900), tmp_path / "out.csv", on_plan=lambda plan: None)
    engine: Any = used.engine
    assert len(engine.prompts) - (600 * 3 + 300) <= (TIMED + 1) * 3 + 2 * TIMED + 1


class PaidThinker(ScriptedThinker, EndpointThinker):
    """An endpoint, whose calls cost."""


def test_an_endpoint_is_asked_nothing_for_a_plan(tmp_path: Path) -> None:
    seen, paid = list[Expected](), PaidThinker()
    compete(pipeline(thinker=paid), make_input(tmp_path), tmp_path / "o.csv", on_plan=seen.append, time_limit=100)
    assert len(paid.prompts) == 90 and seen[0].seconds is not None and seen[0].seconds > 45
