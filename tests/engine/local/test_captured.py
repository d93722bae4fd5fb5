"""Steps of fixed shapes in a running batch, uncaptured on the CPU: the answers are the eager ones."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from polymerge import load_model
from polymerge.engine import GenerateRequest
from polymerge.engine.local import captured
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.local.running import RunningBatch
from polymerge.model.step import FixedStep
from tests.conftest import Merged
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = ["e0", None, "e1", "e2", "average"]
# rows that leave at different times, and more columns than a buffer is made with
REQUESTS = [GenerateRequest([5, 6, 7 + n], EXPERTS[n % 5], max_new_tokens=20 + 7 * n) for n in range(9)]


def engine(merged: Merged, architecture: str, steps: Any) -> HFEngine:
    made = HFEngine(load_model(merged(architecture)[0]), tiny_tokenizer(), fingerprint="")
    made.steps = steps
    return made


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of the fixed steps that were run."""
    run, seen = FixedStep.run, list[tuple[int, int]]()

    def watched(step: FixedStep, rows: Any, column: int) -> Any:
        seen.append((step.rows, step.columns))
        return run(step, rows, column)

    monkeypatch.setattr(FixedStep, "run", watched)
    return seen


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "gpt2"])
def test_answers_are_the_eager_ones(
    merged: Merged, architecture: str, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polymerge.engine.local.cache.GROWTH", 16)
    monkeypatch.setattr("polymerge.engine.local.cache.LEAST_MOVE", 4)
    monkeypatch.setattr("polymerge.engine.local.captured.GROWTH", 16)
    monkeypatch.setattr("polymerge.engine.local.captured.PATIENCE", 2)
    expected = engine(merged, architecture, "eager").generate(REQUESTS)
    assert not shapes
    got = engine(merged, architecture, "fixed").generate(REQUESTS)
    assert [(one.text, one.tokens) for one in got] == [(one.text, one.tokens) for one in expected]
    assert len(set(shapes)) > 2 and len(shapes) > 20


def test_a_row_that_mixes_experts_takes_the_eager_step(merged: Merged, shapes: list[tuple[int, int]]) -> None:
    mixture = GenerateRequest([5, 6], {"e0": 0.5, "e1": 0.5}, max_new_tokens=30)
    fixed = engine(merged, "llama", "fixed")
    assert fixed.generate([mixture]) == engine(merged, "llama", "eager").generate([mixture]) and not shapes
    assert fixed.generate(REQUESTS) and shapes


@pytest.mark.parametrize("architecture", ["mixtral", "gemma3"])
def test_a_model_that_has_no_such_step_says_why_and_runs(
    merged: Merged, architecture: str, shapes: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "polymerge.engine.local.captured"):
        got = engine(merged, architecture, "fixed").generate(REQUESTS[:2])
    assert got == engine(merged, architecture, "eager").generate(REQUESTS[:2]) and not shapes
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("decoding steps are not replayed: a ")


@pytest.mark.parametrize("broken", ["wrong", "raises"])
def test_a_step_that_gives_something_else_is_not_used(
    merged: Merged, broken: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = FixedStep.run, [0]

    def other(step: FixedStep, rows: Any, column: int) -> Any:
        calls[0] += 1
        if broken == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        return run(step, rows, column).roll(1, -1)

    monkeypatch.setattr(FixedStep, "run", other)
    expected = engine(merged, "llama", "eager").generate(REQUESTS)
    with caplog.at_level(logging.INFO, "polymerge.engine.local.captured"):
        assert engine(merged, "llama", "fixed").generate(REQUESTS) == expected
    assert calls == [1] and len(caplog.records) == 1


def test_on_a_cpu_steps_are_eager_unless_asked_for(merged: Merged) -> None:
    assert not RunningBatch(engine(merged, "llama", "auto"))._graphs._on
    assert RunningBatch(engine(merged, "llama", "fixed"))._graphs._on
    assert captured.objection(engine(merged, "llama", "auto")) is None
