"""The run: nothing is lost to bad rows, a short clock, full memory or a kill; the same input gives the same bytes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from polymerge.bundle.lock import writing
from polymerge.compete import compete, pieces
from polymerge.compete.clock import Clock
from polymerge.compete.journal import Journal
from polymerge.errors import LockedError, ModelError, OutputExistsError, PolymergeError
from polymerge.recipe.response import StageSettings
from polymerge.staged import Pipeline
from tests.staged.scripted import ScriptedEngine, ScriptedRouter, ScriptedThinker

ALWAYS = StageSettings(use="always")


def make_input(tmp_path: Path, rows: int = 90, target: bool = False) -> Path:
    file = tmp_path / "test.csv"
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "input", "eval_type", "answer_choices", *(["target"] if target else [])])
        for n in range(rows):
            kind = ["multiple_choice", "['a', 'bb', 'ccc']"] if n % 3 else ["generation", ""]
            topic = ("math", "law", "other")[n % 3 if n % 2 else n % 3 - 1]
            writer.writerow([n, f"{topic} question {n} {'x' * (n % 7)}", *kind, *(["0"] if target else [])])
    return file


def engine() -> ScriptedEngine:
    def like(prompt: str, choice: str) -> float:
        return -float((len(prompt) * 7 + len(choice) * 3) % 5)

    return ScriptedEngine(lambda prompt, expert: f"{expert} says {prompt[-9:]}", like)


def pipeline(**options: Any) -> Pipeline:
    return Pipeline(engine(), options.pop("settings", ALWAYS), chat=False, router=ScriptedRouter(), **options)


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_every_row_is_answered_in_its_place_by_its_expert(tmp_path: Path) -> None:
    source, output = make_input(tmp_path, target=True), tmp_path / "out.csv"
    summary = compete(pipeline(thinker=ScriptedThinker()), source, output)
    rows = read(output)
    assert [row["id"] for row in rows] == [str(n) for n in range(90)]
    for row, asked in zip(rows, read(source), strict=True):
        expected = next((name for name in ("math", "law") if name in asked["input"]), None)
        if asked["eval_type"] == "generation":
            assert row["prediction"].startswith(f"{expected} says")
        else:
            assert row["prediction"] in ("0", "1", "2")
    assert (summary.rows, summary.staged, summary.skipped) == (90, 90, [])
    assert sum(summary.experts.values()) == 90 and summary.experts["math"] > 0
    assert set(summary.scores) == {"accuracy", "rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert not output.with_name("out.csv.partial").exists()


def test_direct_answers_are_bare_prompts_as_in_the_kit(tmp_path: Path) -> None:
    used = pipeline()
    compete(used, make_input(tmp_path, 6), tmp_path / "out.csv")
    assert set(used.engine.prompts) == {row["input"] for row in read(tmp_path / "test.csv")}  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row_are_a_whole_submission(tmp_path: Path, rows: int) -> None:
    compete(pipeline(), make_input(tmp_path, rows), tmp_path / "deep" / "out.csv")
    assert len(read(tmp_path / "deep" / "out.csv")) == rows


def test_bad_rows_fail_before_any_work_or_are_left_empty(tmp_path: Path) -> None:
    source = make_input(tmp_path, 4)
    with source.open("a") as handle:
        handle.write("4,,generation,\n5,q,essay,\n6,last,generation,\n")
    used = pipeline()
    with pytest.raises(PolymergeError, match=r"test\.csv, line 6 \(id 4\): has no input and 1 more.*--on-error skip"):
        compete(used, source, tmp_path / "out.csv")
    assert used.engine.prompts == [] and not (tmp_path / "out.csv").exists()  # type: ignore[attr-defined]
    summary = compete(used, source, tmp_path / "out.csv", on_error="skip")
    rows = read(tmp_path / "out.csv")
    assert [row["prediction"] == "" for row in rows] == [False] * 4 + [True, True, False]
    assert len(summary.skipped) == 2 and "line 7" in summary.skipped[1]


def test_a_row_that_the_engine_refuses_takes_no_other_with_it(tmp_path: Path) -> None:
    def write(prompt: str, expert: Any) -> str:
        if "question 3 " in prompt:
            raise ModelError("out of memory on one request")
        return "fine"

    used = Pipeline(ScriptedEngine(write), chat=False)
    with pytest.raises(ModelError):
        compete(used, make_input(tmp_path, 9), tmp_path / "out.csv")
    summary = compete(used, tmp_path / "test.csv", tmp_path / "out.csv", on_error="skip", overwrite=True)
    assert summary.skipped == ["line 5 (id 3): out of memory on one request"]
    assert [row["prediction"] for row in read(tmp_path / "out.csv")][:7:3] == ["fine", "", "fine"]


def test_when_time_is_over_the_rest_is_answered_directly(tmp_path: Path) -> None:
    summary = compete(pipeline(thinker=ScriptedThinker()), make_input(tmp_path), tmp_path / "out.csv", time_limit=1e-9)
    assert summary.staged == 0 and summary.direct == {"time ran short": 90}
    assert all(row["prediction"] for row in read(tmp_path / "out.csv"))


def test_the_clock_leaves_time_for_the_rows_that_are_left() -> None:
    clock = Clock(limit=100.0)
    assert clock.allows(1e9)  # nothing is known yet
    clock.note(cost=10.0, seconds=10.0)
    assert clock.allows(90.0) and not clock.allows(110.0)
    assert Clock(limit=100.0, used=99.9999).seconds > 99


def test_over_the_memory_limit_the_thinker_is_unloaded_and_the_rest_direct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "peak_bytes", lambda: 2000)
    thinker = ScriptedThinker()
    summary = compete(pipeline(thinker=thinker), make_input(tmp_path, 9), tmp_path / "out.csv", memory_limit=1000)
    assert thinker.prompts == [] and thinker.unloaded > 0
    assert summary.direct == {"memory ran short": 9} and len(read(tmp_path / "out.csv")) == 9


def test_a_missing_scorer_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    used = pipeline()
    with pytest.raises(PolymergeError, match=r"pip install -e .\.\[compete\]"):
        compete(used, make_input(tmp_path, 3, target=True), tmp_path / "out.csv")
    assert used.engine.prompts == []  # type: ignore[attr-defined]


def test_an_existing_submission_and_another_runs_work_are_kept(tmp_path: Path) -> None:
    source, output = make_input(tmp_path, 3), tmp_path / "out.csv"
    output.write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        compete(pipeline(), source, output)
    assert output.read_text() == "mine"
    output.unlink()
    (tmp_path / "out.csv.partial").write_text('{"polymerge": "another"}\n')
    with pytest.raises(OutputExistsError, match=r"out\.csv\.partial: half-done work of another"):
        compete(pipeline(), source, output)
    compete(pipeline(), source, output, overwrite=True)
    assert len(read(output)) == 3


@pytest.mark.parametrize("text", ["", "years of work", "[]", '{"mine": 1}\n', "\x00\xff"])
def test_a_strangers_file_in_the_place_of_the_journal_is_never_touched(tmp_path: Path, text: str) -> None:
    source, output = make_input(tmp_path, 3), tmp_path / "out.csv"
    (tmp_path / "out.csv.partial").write_text(text)
    (tmp_path / "out.csv.writing").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"out\.csv\.partial: is in the way"):
            compete(pipeline(), source, output, overwrite=overwrite)
    assert (tmp_path / "out.csv.partial").read_text() == text and not output.exists()
    (tmp_path / "out.csv.partial").unlink()
    compete(pipeline(), source, output)
    assert (tmp_path / "out.csv.writing").read_text() == "mine"


def test_a_submission_is_written_by_one_run_at_a_time_and_where_a_link_leads(tmp_path: Path) -> None:
    source, output = make_input(tmp_path, 3), tmp_path / "out.csv"
    with writing(output), pytest.raises(LockedError, match=r"out\.csv: another polymerge process"):
        compete(pipeline(), source, output)
    assert not output.exists()
    (tmp_path / "disk").mkdir()
    output.symlink_to(tmp_path / "disk" / "sub.csv")
    for _ in range(2):
        compete(pipeline(), source, output, overwrite=True)
        assert output.is_symlink() and len(read(tmp_path / "disk" / "sub.csv")) == 3
    with pytest.raises(OutputExistsError, match="is a folder"):
        compete(pipeline(), source, tmp_path / "disk", overwrite=True)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("stop", [0, 1, 2, 4, 6, 8, 9])
def test_stopped_after_any_note_it_goes_on_without_doing_work_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """And a note that was cut in the middle of its line is done again."""
    source = make_input(tmp_path)
    whole = tmp_path / "whole.csv"
    compete(pipeline(thinker=ScriptedThinker()), source, whole)

    output, count = tmp_path / "out.csv", [0]
    add = Journal.add

    def adding(self: Any, entry: Any) -> None:
        if count[0] == stop:
            raise Stopped
        count[0] += 1
        add(self, entry)

    monkeypatch.setattr(Journal, "add", adding)
    with pytest.raises(Stopped):
        compete(pipeline(thinker=ScriptedThinker()), source, output)
    monkeypatch.setattr(Journal, "add", add)
    assert not output.exists()
    journal = tmp_path / "out.csv.partial"
    notes = journal.read_bytes().splitlines()
    journal.write_bytes(journal.read_bytes() + b'{"piece": 7, "answ')
    thinker = ScriptedThinker()
    again = pipeline(thinker=thinker)
    compete(again, source, output)
    assert output.read_bytes() == whole.read_bytes()
    thought = sum(len(line.split(b'"text"')) - 1 for line in notes if b'"thoughts"' in line)
    assert len(thinker.prompts) == 90 - thought


def test_killed_with_kill_9_and_started_again_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    source = make_input(tmp_path)
    compete(pipeline(thinker=ScriptedThinker()), source, tmp_path / "whole.csv")
    code = (
        "import sys, time; from pathlib import Path; from tests.compete import test_run as t\n"
        "from tests.staged.scripted import ScriptedThinker; from polymerge.compete import compete\n"
        "p = t.pipeline(thinker=ScriptedThinker()); answer = p.answer\n"
        "def slow(*a, **k): time.sleep(0.15); return answer(*a, **k)\n"
        "p.answer = slow; compete(p, sys.argv[1], sys.argv[2])"
    )
    journal, output = tmp_path / "out.csv.partial", tmp_path / "out.csv"
    kills = 0
    while not output.exists():
        process = subprocess.Popen([sys.executable, "-c", code, str(source), str(output)], env=os.environ)
        before = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and kills < 2:
            if journal.exists() and b'"answers"' in journal.read_bytes() and journal.stat().st_size > before + 100:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        assert process.wait(timeout=120) in (0, -signal.SIGKILL)  # else it would be started again for ever
    assert kills > 0
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not journal.exists()


def test_progress_tells_phase_rows_time_and_memory(tmp_path: Path) -> None:
    seen: list[Any] = []
    compete(pipeline(thinker=ScriptedThinker()), make_input(tmp_path), tmp_path / "out.csv", progress=seen.append)
    assert [step.phase for step in seen if step.done == step.total] == ["routing", "thinking", "answering"]
    assert all(step.time_limit == 3600 and step.peak_memory > 0 for step in seen)
    assert seen[-1].seconds_left == 0
