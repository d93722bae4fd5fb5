"""How to ask is picked on validation rows, by field, and direct answers alone follow it."""

from __future__ import annotations

from typing import Any

import pytest

from polymerge.recipe.response import StageSettings
from polymerge.staged import Pipeline, Question
from polymerge.staged.asking import ALL, AskingEvidence, ways_of_asking
from polymerge.staged.evidence import Evidence, weigh_asking
from polymerge.staged.lead import Lead
from polymerge.staged.validation import AnsweredQuestion, validate_asking
from tests.staged.scripted import ScriptedEngine, ScriptedThinker

LEAD = Lead("Be brief.", (("1 + 1", "2"),))


def rows(field: str, count: int = 12) -> list[AnsweredQuestion]:
    return [AnsweredQuestion(Question(f"{field} {n}"), "7", final="7") for n in range(count)]


def write(prompt: str, expert: Any) -> str:
    """Sums need examples in a conversation, laws a bare prompt."""
    shown = "<assistant>2<user>" in prompt
    right = shown if "math" in prompt else "<user>" not in prompt
    return "it is 7" if right else "it is 8"


def measured(engine: ScriptedEngine) -> AskingEvidence:
    return validate_asking(engine, {"math": rows("math"), "law": rows("law")}, LEAD)


def test_every_way_is_there_once_and_the_bare_one_first() -> None:
    ways = ways_of_asking(LEAD)
    assert next(iter(ways)) == "bare" and len(ways) == len(set(map(repr, ways.values()))) == 8
    assert ways["chat + few-shot + system"].lead == LEAD and ways["chat + few-shot + system"].chat
    assert list(ways_of_asking(Lead())) == ["bare", "chat"]


def test_each_field_has_its_own_way_and_a_strange_one_that_of_all_rows() -> None:
    engine = ScriptedEngine(write)
    asking = measured(engine)
    assert asking.best("math") == "chat + few-shot" and asking.best("law") == "bare"
    assert asking.fields["math"].scores["chat + few-shot"] == 1 and asking.fields["law"].scores["chat"] == 0
    assert asking.best("history") == asking.fields[ALL].best == "bare"

    def accuracy(field: str) -> float:
        auto = Pipeline(engine, expert=field, chat=False, asking=asking)
        return sum("7" in r.text for r in auto.respond([s.question for s in rows(field)])) / 12

    assert accuracy("math") == accuracy("law") == 1.0  # no single way gives both


def test_a_gain_that_chance_explains_is_not_taken() -> None:
    bare, better = [0.0] * 12, [1.0] * 5 + [0.0] * 7
    assert weigh_asking({"bare": bare, "chat": better}).best == "chat"  # 1 in 32
    seven = {f"way {n}": bare for n in range(6)} | {"chat": better}
    assert weigh_asking({"bare": bare, **seven}).best == "bare"  # 1 in 32 of seven tries


def test_an_answer_after_a_thought_is_asked_for_as_its_gain_was_measured() -> None:
    engine = ScriptedEngine(write)
    asking = measured(engine)
    engine.prompts.clear()
    always = StageSettings(use="always")
    Pipeline(engine, always, thinker=ScriptedThinker(), expert="math", chat=False, asking=asking).respond(
        [Question("math 1")]
    )
    assert "a thought" in engine.prompts[0] and "<user>" not in engine.prompts[0]


@pytest.mark.parametrize("lead", [Lead(), LEAD])
def test_what_is_noted_is_what_is_read(lead: Lead) -> None:
    asking = validate_asking(ScriptedEngine(write), {"math": rows("math")}, lead)
    noted = Evidence(bundle="b", thinker="", prompts="", fields={}, asking=asking)
    read = Evidence.model_validate_json(noted.to_bytes())
    assert read == noted and read.asking and read.asking.way("math") == asking.way("math")
