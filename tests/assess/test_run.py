"""An assessment with scripted models: what is measured, remembered, and told where something goes wrong."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polymerge.assess import Assessment, assess, assess_bundle, load_assess_recipe, write_assessment_table
from polymerge.assess.measure import AskSettings
from polymerge.assess.process import run_in_process
from polymerge.assess.worker import CandidateJob, run_job
from polymerge.errors import DataError, ModelError
from polymerge.report import write_assessment, write_report
from tests.conftest import Merged
from tests.scripted import ScriptedEngine
from tests.tiny import tiny_tokenizer

Checkpoints = Callable[[str], dict[str, Path]]

ROWS = {
    "sums": [{"prompt": f"{n} + 1", "answer": f"it is {n + 1}", "final": n + 1} for n in range(4)],
    "pick": [{"prompt": f"pick {x}", "answer": x, "choices": ["a", "bb"], "task": x} for x in ("a", "bb")],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        file = tmp_path / "data" / name / "test.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


class Scripted:
    """Runs jobs on scripted engines in this process. e0 adds, e1 picks; the expert counts where there is one."""

    def __init__(self) -> None:
        self.jobs: list[CandidateJob] = []
        self.die_after: int | None = None

    def __call__(self, job: CandidateJob) -> Iterator[dict[str, Any]]:
        self.jobs.append(job)
        name = Path(job.source.get("source", "")).name[-1:]

        def answer(expert: Any, prompt: str) -> str:
            who = expert or f"e{name}"
            if who == "e0" and "+" in prompt:
                return f"it is {int(prompt.split()[0]) + 1}"
            return prompt.split()[-1] if who == "e1" and prompt.startswith("pick") else "zz"

        events: list[dict[str, Any]] = []
        run_job(job, ScriptedEngine(answer, ["e0", "e1"], fingerprint=f"scripted {name}"), events.append)
        for number, event in enumerate(events):
            if self.die_after is not None and number >= self.die_after:
                raise KeyboardInterrupt
            yield event


def recipe(checkpoints: Checkpoints, data: Path, **changes: Any) -> Any:
    experts = checkpoints("llama")
    return load_assess_recipe({"candidates": {name: str(path) for name, path in experts.items()}}, data, **changes)


def run(checkpoints: Checkpoints, data: Path, runner: Scripted, **changes: Any) -> Assessment:
    return assess(recipe(checkpoints, data, **changes), cache=data.parent / "cache", run=runner)


def test_every_candidate_on_every_field_and_a_proposal(checkpoints: Checkpoints, data: Path) -> None:
    assessment = run(checkpoints, data, Scripted(), memory_gb=1)
    assert assessment.table == {
        "pick": {"e0": 0.5, "e1": 1.0, "e2": 0.5},
        "sums": {"e0": 1.0, "e1": 0.0, "e2": 0.0},
    }
    assert assessment.proposals and assessment.proposals.chosen and assessment.proposals.chosen.experts == ("e0", "e1")
    measured = assessment.candidates[1].measured["pick"][str(data / "pick" / "test.jsonl")]
    assert measured.by_task == {"a": 1.0, "bb": 1.0} and measured.questions == 2 and measured.f1 is None
    assert assessment.candidates[0].measured["sums"][str(data / "sums" / "test.jsonl")].f1 == 1.0
    assert assessment.candidates[0].peak_memory > 0 and (assessment.candidates[0].tokens_per_second or 0) > 0


def test_what_was_measured_is_remembered_until_something_changes(checkpoints: Checkpoints, data: Path) -> None:
    runner = Scripted()
    first = run(checkpoints, data, runner)
    assert len(runner.jobs) == 3
    assert run(checkpoints, data, runner).to_json() == first.to_json() and len(runner.jobs) == 3
    run(checkpoints, data, runner, limit=1)
    assert len(runner.jobs) == 6
    with (data / "sums" / "test.jsonl").open("a") as file:
        file.write('{"prompt": "8 + 1", "answer": "9"}\n')
    run(checkpoints, data, runner)
    assert [Path(task).parent.name for _, task, _ in runner.jobs[-1].work] == ["sums"]
    assess(recipe(checkpoints, data), cache=data.parent / "cache", run=runner, fresh=True)
    assert [len(job.work) for job in runner.jobs[-3:]] == [2, 2, 2]


def test_a_run_that_was_killed_goes_on_where_it_was(checkpoints: Checkpoints, data: Path) -> None:
    runner = Scripted()
    runner.die_after = 4  # after the first task of the first candidate
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints, data, runner)
    runner.die_after = None
    assessment = run(checkpoints, data, runner)
    assert [len(job.work) for job in runner.jobs[1:]] == [1, 2, 2]
    assert assessment.table["sums"] == {"e0": 1.0, "e1": 0.0, "e2": 0.0}


def test_a_candidate_that_fails_is_a_row_with_its_reason(checkpoints: Checkpoints, data: Path, tmp_path: Path) -> None:
    class Fails(Scripted):
        def __call__(self, job: CandidateJob) -> Iterator[dict[str, Any]]:
            if job.source["source"].endswith("1"):
                yield {"event": "failed", "expert": None, "task": None, "reason": "its process was ended by SIGKILL"}
            else:
                yield from super().__call__(job)

    sources = {name: str(path) for name, path in checkpoints("llama").items()}
    whole = load_assess_recipe({"candidates": {**sources, "gone": str(tmp_path / "gone")}}, data)
    assessment = assess(whole, cache=tmp_path / "cache", run=Fails())
    reasons = {row.name: row.failed for row in assessment.candidates}
    assert reasons["e0"] == {} and reasons["e1"] == {"": "its process was ended by SIGKILL"}
    assert "no such folder" in reasons["gone"][""]
    assert assessment.table["sums"] == {"e0": 1.0, "e2": 0.0}
    assert assessment.proposals and assessment.proposals.chosen and assessment.proposals.chosen.experts == ("e0",)


def test_candidates_of_two_families_are_measured_and_never_proposed_together(
    checkpoints: Checkpoints, data: Path, tmp_path: Path
) -> None:
    sources = {"e0": checkpoints("llama")["e0"], "e1": checkpoints("qwen2")["e1"]}
    whole = load_assess_recipe({"candidates": {name: str(path) for name, path in sources.items()}}, data)
    assessment = assess(whole, cache=tmp_path / "cache", run=Scripted())
    assert assessment.proposals and assessment.proposals.chosen and len(assessment.proposals.chosen.experts) == 1
    assert assessment.proposals.sets == 2 and "different architectures" in assessment.proposals.notes[0]


def test_a_task_that_fails_leaves_the_others(checkpoints: Checkpoints, data: Path) -> None:
    class Narrow(ScriptedEngine):
        def loglikelihood(self, requests: Any) -> Any:
            raise ModelError("out of memory on one request")

    def runner(job: CandidateJob) -> Iterator[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        run_job(job, Narrow(lambda expert, prompt: "it is 1"), events.append)
        return iter(events)

    assessment = assess(recipe(checkpoints, data), cache=data.parent / "cache", run=runner)
    assert assessment.candidates[0].failed == {"pick": "out of memory on one request"}
    assert assessment.table == {"pick": {}, "sums": {"e0": 0.25, "e1": 0.25, "e2": 0.25}}


def test_a_bad_data_set_stops_everything_before_a_model_is_loaded(checkpoints: Checkpoints, data: Path) -> None:
    runner = Scripted()
    (data / "sums" / "test.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="line 1: answer: is missing"):
        run(checkpoints, data, runner)
    assert not runner.jobs


def test_a_bundles_own_experts_and_its_report(merged: Merged, data: Path, tmp_path: Path) -> None:
    bundle, _ = merged("llama")
    names = {name: str(bundle.path) for name in bundle.experts}
    assessment = assess_bundle(
        bundle, load_assess_recipe({"candidates": names}, data), cache=tmp_path / "cache", run=Scripted()
    )
    assert assessment.table["sums"] == {"e0": 1.0, "e1": 0.0, "e2": 0.0, "average": 0.0}
    file = bundle.path / "router" / "assessment.json"
    write_assessment_table(assessment, file)
    try:
        assert json.loads(file.read_text())["fields"] == assessment.table
        pytest.importorskip("plotly")
        assert "<h2>Accuracy by field</h2>" in write_report(bundle, tmp_path / "report.html").read_text()
    finally:
        file.unlink()


def test_a_page_of_its_own_shows_the_failures_and_the_proposal(
    checkpoints: Checkpoints, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("plotly")
    sources = {name: str(path) for name, path in checkpoints("llama").items()}
    whole = load_assess_recipe({"candidates": {**sources, "gone": "<b>/gone"}}, data)
    assessment = assess(whole, cache=tmp_path / "cache", run=Scripted())
    page = write_assessment(assessment.to_json(), tmp_path / "page.html").read_text()
    assert "<h2>Proposal</h2>" in page and "e0 + e1" in page
    assert "&lt;b&gt;/gone" in page and "<b>/gone" not in page


def test_a_process_of_its_own_measures_a_real_checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Two processes: a tiny model, and one whose folder loses its weights before it is loaded."""
    folder = checkpoints("llama")["e0"]
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "test.jsonl"
    file.write_text(
        '{"prompt": "w3 w4", "answer": "w5", "choices": ["w5", "w6 w7"]}\n{"prompt": "w8", "answer": "w9"}\n'
    )
    whole = load_assess_recipe(
        {"candidates": {"good": str(folder), "gone": str(tmp_path)}, "fields": {"set": str(file)}, "max_new_tokens": 4}
    )
    good, gone = assess(whole, cache=tmp_path / "cache").candidates
    assert good.failed == {} and 0 <= good.accuracies(whole.fields)["set"] <= 1
    measured = good.measured["set"][str(file)]
    assert measured.weights_bytes > 50_000 and measured.peak_memory > measured.weights_bytes and not measured.on_gpu
    assert "no config.json" in gone.failed[""]


@dataclass(frozen=True)
class Unknown(AskSettings):
    """Settings that a worker does not know."""

    mood: str = "good"


def test_a_worker_that_dies_is_a_failure_with_its_last_words() -> None:
    [event] = list(run_in_process(CandidateJob({}, [], Unknown())))
    assert event["event"] == "failed" and "its process ended with 1" in event["reason"]
    assert "mood" in event["reason"]
