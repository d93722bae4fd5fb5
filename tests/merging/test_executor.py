"""Who does tensors beforehand, and when: in order, with a bounded number of results that wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polymerge.bundle.files import Rows
from polymerge.merging import executor
from polymerge.merging.compress import Emit, TensorReport
from polymerge.merging.executor import Made, in_turn, make

ROLES = ["embedding", *["linear"] * 4, "norm", *["linear"] * 5, "norm", "linear"]


def a_plan() -> Any:
    return SimpleNamespace(
        tasks=[SimpleNamespace(against_base=role == "linear") for role in ROLES], weights=lambda task: {}
    )


@pytest.mark.parametrize("ahead", [1, 2, 3, 100])
@pytest.mark.parametrize("first", [0, 1, 4, 6, 12])
def test_tasks_come_in_order_and_no_more_than_allowed_wait(
    monkeypatch: pytest.MonkeyPatch, ahead: int, first: int
) -> None:
    monkeypatch.setattr(executor, "_in_its_turn", lambda plan, index: index)
    plan, waiting, most, given = a_plan(), 0, 0, []

    def start(index: int) -> Callable[[], Made]:
        nonlocal waiting, most
        assert ROLES[index] == "linear"
        waiting += 1
        most = max(most, waiting)

        def result() -> Made:
            nonlocal waiting
            waiting -= 1
            return Made((), TensorReport({"which": str(index)}))

        return result

    for index, work in in_turn(plan, range(first, len(ROLES)), start, ahead=ahead):
        given.append(index)
        if ROLES[index] == "linear":
            assert work(lambda *_: None).digests == {"which": str(index)}
        else:
            assert work == index  # to be done now, by whoever asks
    assert given == list(range(first, len(ROLES)))
    assert most == min(ahead, ROLES[first:].count("linear"))


def test_workers_do_tensors_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, together = a_plan(), threading.Barrier(2, timeout=30)
    plan.recipe, plan.checkpoints, plan.dtype = SimpleNamespace(workers=2, device="cpu"), {}, torch.float32
    monkeypatch.setattr(executor, "settings_of", lambda *_: None)
    monkeypatch.setattr(executor, "_in_its_turn", lambda plan, index: index)

    def meeting(*_: Any) -> Made:
        together.wait()
        return Made((), TensorReport())

    monkeypatch.setattr(executor, "make", meeting)
    plan.tasks = [plan.tasks[1]] * 4
    assert [index for index, _ in executor.in_threads(plan, range(4))] == [0, 1, 2, 3]


def test_a_stopped_merge_waits_for_no_tensor_that_was_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, done = a_plan(), []
    plan.recipe, plan.checkpoints, plan.dtype = SimpleNamespace(workers=2, device="cpu"), {}, torch.float32
    monkeypatch.setattr(executor, "settings_of", lambda *_: None)

    def slow(task: Any, *_: Any) -> Made:
        time.sleep(0.05)
        done.append(task)
        return Made((), TensorReport())

    monkeypatch.setattr(executor, "make", slow)
    plan.tasks = [plan.tasks[1]] * 50
    works = executor.in_threads(plan, range(50))
    next(works)
    works.close()
    assert len(done) <= 6


def test_what_is_given_later_is_what_was_emitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the arithmetic goes on with the memory of what it emitted."""

    def work(task: Any, settings: Any, read: Any, emit: Emit, *_: Any) -> TensorReport:
        values = torch.arange(4.0)
        emit(None, "x", values)
        values.zero_()
        emit("e", "y", Rows(torch.float32, (4,), (torch.ones(2), torch.zeros(2))))
        return TensorReport({"e": "12"})

    monkeypatch.setattr(executor, "compress_tensor", work)
    emitted: list[tuple[Any, ...]] = []
    made = make(SimpleNamespace(base="average"), {}, None, {})  # type: ignore[arg-type]
    assert made.give(lambda *piece: emitted.append(piece)).digests == {"e": "12"}
    assert [(owner, key, tensor.tolist()) for owner, key, tensor in emitted] == [
        (None, "x", [0.0, 1.0, 2.0, 3.0]),
        ("e", "y", [1.0, 1.0, 0.0, 0.0]),
    ]
