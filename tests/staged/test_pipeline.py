"""Route, decide, think, answer: what happens to a question, and that a failing thinker never costs an answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from polymerge.recipe.response import StageSettings
from polymerge.staged import Evidence, LocalThinker, Pipeline, Question, Thought
from polymerge.staged.evidence import FieldEvidence, weigh
from polymerge.staged.thought import OUT_OF_TIME, failed
from tests.staged.scripted import ScriptedEngine, ScriptedRouter, ScriptedThinker

ALWAYS = StageSettings(use="always")
MATH, LAW, NONE = Question("math: 1 + 1?"), Question("law: yes?", ("yes", "no")), Question("who?")


def evidence(pipeline: Pipeline, **best: Any) -> Evidence:
    fields = {
        name: FieldEvidence(rows=50, scores={"direct": 0.5, "v1": 0.6, "v2": 0.7}, best=way)
        for name, way in best.items()
    }
    thinker = pipeline.thinker.fingerprint if pipeline.thinker else ""
    return Evidence(bundle=pipeline.engine.fingerprint, thinker=thinker, prompts=pipeline.digest, fields=fields)


def test_thoughts_and_answers_come_apart_and_all_thoughts_come_first() -> None:
    order: list[str] = []

    def write(prompt: str, expert: Any) -> str:
        order.append("answer")
        return "two"

    def think(prompt: str) -> Thought:
        order.append("thought")
        return Thought(f"about {prompt[:4]}", 7, 3)

    pipeline = Pipeline(ScriptedEngine(write), ALWAYS, thinker=ScriptedThinker(think), router=ScriptedRouter())
    first, second = pipeline.respond([MATH, Question("math: 2 + 2?")])
    assert order == ["thought", "thought", "answer", "answer"]
    assert (first.text, first.thought, first.stage, first.expert) == ("two", "about math", "staged", "math")
    assert first.thinker_tokens == 3 and first.tokens == 3 + len("two")
    assert "about math" in pipeline.engine.prompts[0] and "math: 2 + 2?" in pipeline.engine.prompts[1]  # type: ignore[attr-defined]
    assert second.to_json()["thought"] == "about math"


def test_choices_are_scored_after_the_thought_and_v2_asks_for_agreement() -> None:
    def like(prompt: str, choice: str) -> float:
        staged = "a thought" in prompt
        return {"yes": -1.0, "no": -3.0}[choice] if staged else {"yes": -9.0, "no": -2.0}[choice]

    def scores(**settings: Any) -> tuple[float, ...]:
        pipeline = Pipeline(
            ScriptedEngine(like=like), StageSettings(use="always", **settings), thinker=ScriptedThinker()
        )
        return pipeline.respond([LAW])[0].scores

    assert scores(prompts="v1") == (-1.0, -3.0)
    assert scores(prompts="v2") == (-5.0, -2.5)
    assert scores(prompts="v1", length_norm="tokens") == (-1 / 3, -3 / 2)
    assert Pipeline(ScriptedEngine(like=like)).respond([LAW])[0].scores == (-9.0, -2.0)


@pytest.mark.parametrize(
    ("thought", "reason"),
    [
        (failed("the endpoint is down"), "the endpoint is down"),
        (Thought("  "), "wrote nothing"),
        (Thought("x" * 2000), "do not fit"),
    ],
)
def test_a_failed_thought_is_a_direct_answer_with_the_reason(thought: Thought, reason: str) -> None:
    engine = ScriptedEngine(max_length=1000)
    pipeline = Pipeline(engine, ALWAYS, thinker=ScriptedThinker(lambda prompt: thought))
    response = pipeline.respond([MATH])[0]
    assert (response.stage, response.thought, response.text) == ("direct", "", "written")
    assert reason in response.reason
    assert engine.prompts == ["<user>math: 1 + 1?<assistant>"]


def test_a_cut_thought_is_still_of_use() -> None:
    thinker = ScriptedThinker(lambda prompt: Thought("half a", 1, 1, finish="length"))
    assert Pipeline(ScriptedEngine(), ALWAYS, thinker=thinker).respond([MATH])[0].stage == "staged"


@pytest.mark.parametrize(
    ("settings", "confidence", "reasons"),
    [
        ({"use": "always"}, 0.9, ["always", "always", "always"]),
        ({"use": "never"}, 0.9, ["never", "never", "never"]),
        ({"use": "never", "fields": {"law": "always"}}, 0.9, ["never", "always", "never"]),
        ({"use": "auto"}, 0.9, ["v2 gained +0.200", "no gain from thinking in field 'law'", "fallback"]),
        ({"use": "auto"}, 0.3, ["confidence 0.30 is under 0.5", "confidence 0.30 is under 0.5", "fallback"]),
        ({"use": "auto", "min_confidence": 0.2}, 0.3, ["v2 gained", "no gain", "fallback"]),
    ],
)
def test_the_policy_of_a_field_decides(settings: dict[str, Any], confidence: float, reasons: list[str]) -> None:
    chosen = StageSettings(**settings)
    router = ScriptedRouter(confidence=confidence)
    plain = Pipeline(ScriptedEngine(), chosen, thinker=ScriptedThinker(), router=router)
    pipeline = Pipeline(
        ScriptedEngine(),
        chosen,
        thinker=ScriptedThinker(),
        router=router,
        evidence=evidence(plain, math="v2", law="direct"),
    )
    steps = pipeline.steps([MATH, LAW, NONE])
    assert all(reason in step.reason for step, reason in zip(steps, reasons, strict=True)), steps
    assert [bool(step.version) for step in steps] == [r.startswith(("always", "v2")) for r in reasons]


def test_auto_without_evidence_or_with_that_of_others_answers_directly() -> None:
    plain = Pipeline(ScriptedEngine(), thinker=ScriptedThinker(), expert="math")
    assert plain.steps([MATH])[0].version is None
    assert "polymerge stages" in plain.steps([MATH])[0].reason
    known = evidence(plain, math="v1")
    assert (
        Pipeline(ScriptedEngine(), thinker=ScriptedThinker(), expert="math", evidence=known).steps([MATH])[0].version
        == "v1"
    )
    other = known.model_copy(update={"thinker": "another", "bundle": "another"})
    step = Pipeline(ScriptedEngine(), thinker=ScriptedThinker(), expert="math", evidence=other).steps([MATH])[0]
    assert step.version is None and "another bundle and thinker" in step.reason


def test_no_thinker_no_questions_and_no_router_are_fine() -> None:
    pipeline = Pipeline(ScriptedEngine(), ALWAYS, expert="law")
    assert pipeline.respond([]) == []
    assert pipeline.respond([LAW])[0].reason == "there is no thinker"
    assert pipeline.respond([LAW])[0].field == "law"


def test_thought_seconds_bound_all_thoughts_of_a_call() -> None:
    seen: list[float | None] = []

    class Timed(ScriptedThinker):
        def think(self, prompts: Any, *, max_tokens: int, deadline: float | None = None) -> list[Thought]:
            seen.append(deadline)
            return super().think(prompts, max_tokens=max_tokens)

    pipeline = Pipeline(ScriptedEngine(), StageSettings(use="always", thought_seconds=5), thinker=Timed())
    began = time.monotonic()
    pipeline.respond([MATH])
    pipeline.respond([MATH], deadline=began + 1)
    assert seen[0] is not None and 4 < seen[0] - began < 6
    assert seen[1] == began + 1


def test_low_memory_unloads_the_thinker_before_the_answers() -> None:
    thinker = ScriptedThinker()

    def write(prompt: str, expert: Any) -> str:
        return f"unloaded {thinker.unloaded}"

    response = Pipeline(ScriptedEngine(write), ALWAYS, thinker=thinker, low_memory=True).respond([MATH])[0]
    assert response.text == "unloaded 1"


def test_a_question_that_is_too_long_loses_its_beginning_not_the_run() -> None:
    engine = ScriptedEngine(max_length=100)
    Pipeline(engine, chat=False).respond([Question("a" * 500 + "end", max_new_tokens=20)])
    assert engine.prompts[0].endswith("end") and len(engine.prompts[0]) == 80


def test_a_local_thinker_that_runs_out_of_memory_fails_only_where_it_must() -> None:
    def write(prompt: str, expert: Any) -> str:
        if "long" in prompt:
            raise MemoryError("not enough")
        return "thought"

    thinker = LocalThinker("scripted", lambda: ScriptedEngine(write))
    thoughts = thinker.think(["a long one", "short"], max_tokens=8)
    assert [t.finish for t in thoughts] == ["failed", "stop"]
    assert "not enough" in thoughts[0].error and thoughts[1].text == "thought"

    def load() -> Any:
        raise RuntimeError("can't allocate memory")

    assert "could not be loaded" in LocalThinker("big", load).think(["x"], max_tokens=8)[0].error


def test_a_local_thinker_stops_at_its_deadline_and_loads_again_after_unload() -> None:
    loads: list[int] = []

    def load() -> Any:
        loads.append(1)
        return ScriptedEngine(lambda prompt, expert: "t")

    thinker = LocalThinker("scripted", load)
    assert thinker.think(["x"], max_tokens=8, deadline=time.monotonic() - 1)[0].error == OUT_OF_TIME
    thinker.unload()
    assert thinker.think(["x"], max_tokens=8)[0].text == "t"
    assert len(loads) == 2


def test_auto_takes_a_stage_only_where_its_gain_is_no_chance() -> None:
    direct = [0.0] * 20
    assert weigh({"direct": direct, "v1": [1.0] * 2 + [0.0] * 18, "v2": direct}).best == "direct"  # p = 0.25
    assert weigh({"direct": direct, "v1": [1.0] * 5 + [0.0] * 15, "v2": [1.0] * 8 + [0.0] * 12}).best == "v2"
    assert weigh({"direct": [1.0] * 10, "v1": [0.0] * 10, "v2": [1.0] * 10}).best == "direct"
    assert weigh({"direct": [], "v1": [], "v2": []}).best == "direct"


def test_evidence_comes_back_from_its_file_and_a_damaged_one_is_a_line(tmp_path: Path) -> None:
    assert Evidence.load(tmp_path) is None
    measured = evidence(Pipeline(ScriptedEngine()), math="v2")
    (tmp_path / "staged.json").write_bytes(measured.to_bytes())
    assert Evidence.load(tmp_path) == measured
    (tmp_path / "staged.json").write_bytes(measured.to_bytes()[:-20])
    with pytest.raises(Exception, match=r"staged\.json.*polymerge stages") as caught:
        Evidence.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
