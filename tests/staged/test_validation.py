"""The ablation and what it leaves for the policy `auto`; a pipeline from a bundle's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polymerge.errors import RecipeError
from polymerge.recipe.response import StageSettings, ThinkerSettings
from polymerge.staged import Pipeline, Question
from polymerge.staged.opening import DEFAULT_THINKER, stage_settings, thinker_settings
from polymerge.staged.validation import AnsweredQuestion, read_questions, score, validate
from tests.staged.scripted import ScriptedEngine, ScriptedThinker


def questions(field: str, count: int = 12) -> list[AnsweredQuestion]:
    return [AnsweredQuestion(Question(f"{field} {n}"), "7", final="7") for n in range(count)]


def test_a_field_where_thinking_helps_is_thought_about_and_one_where_it_hurts_is_not() -> None:
    def write(prompt: str, expert: Any) -> str:
        helps = "math" in prompt
        return "it is 7" if ("a thought" in prompt) == helps else "it is 8"

    engine, thinker = ScriptedEngine(write), ScriptedThinker()
    evidence = validate(engine, thinker, {"math": questions("math"), "law": questions("law")})
    assert evidence.fields["math"].scores == {"direct": 0.0, "v1": 1.0, "v2": 1.0}
    assert (evidence.fields["math"].best, evidence.fields["law"].best) == ("v1", "direct")

    def accuracy(field: str) -> float:
        auto = Pipeline(engine, thinker=thinker, expert=field, evidence=evidence)
        return sum("7" in r.text for r in auto.respond([s.question for s in questions(field)])) / 12

    assert accuracy("math") == 1.0 and accuracy("law") == 1.0  # auto does not lose to direct


def test_evidence_counts_for_other_settings_of_use_but_not_for_other_prompts(tmp_path: Path) -> None:
    engine, thinker = ScriptedEngine(lambda p, e: "7" if "a thought" in p else "8"), ScriptedThinker()
    evidence = validate(engine, thinker, {"math": questions("math")}, settings=StageSettings(use="never"))

    def version(**settings: Any) -> Any:
        chosen = StageSettings(**settings)
        return (
            Pipeline(engine, chosen, thinker=thinker, expert="math", evidence=evidence)
            .steps([Question("q")])[0]
            .version
        )

    assert version() == version(min_confidence=0.1) == "v1"
    assert version(thought_tokens=7) is None
    (tmp_path / "think.text.jinja").write_text("{{ question }}")
    assert version(templates=str(tmp_path)) is None


@pytest.mark.parametrize(
    ("asked", "text", "value"),
    [
        (AnsweredQuestion(Question("q", ("a", "b")), "a"), "a", 1.0),
        (AnsweredQuestion(Question("q"), "1200", final="1200"), "so 3 * 400 = 1,200.", 1.0),
        (AnsweredQuestion(Question("q"), "5", final="5"), "5 or 6", 0.0),
        (AnsweredQuestion(Question("q"), "5", final="5"), "none", 0.0),
        (AnsweredQuestion(Question("q"), "ls -l"), "ls -l", 1.0),
        (AnsweredQuestion(Question("q"), "ls -l"), "", 0.0),
        (AnsweredQuestion(Question("q"), "a b"), "a c", 0.5),
    ],
)
def test_scores_are_exact_for_choices_and_numbers_and_f1_for_text(
    asked: AnsweredQuestion, text: str, value: float
) -> None:
    assert score(asked, text) == value


def test_questions_take_choices_numbers_and_a_limit(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "answer": "a = 3", "final": "3"},
        {"prompt": "p", "answer": "x", "choices": ["x", "y"]},
        {"prompt": "p", "answer": "x"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = read_questions(file, limit=2)
    assert [(q.answer, q.final, q.question.choices) for q in taken] == [("a = 3", "3", ()), ("x", None, ("x", "y"))]


def test_a_final_of_nothing_is_a_number_like_others(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "answer": "5 - 5 = 0", "final": 0}\n')
    [asked] = read_questions(tmp_path / "rows.jsonl")
    assert (score(asked, "5 - 5 = 0"), score(asked, "5")) == (1.0, 0.0)


def test_settings_of_the_command_line_stand_over_the_recipes() -> None:
    base = StageSettings(use="always", thought_tokens=9)
    assert stage_settings(base, prompts="v1", use=None) == StageSettings(use="always", thought_tokens=9, prompts="v1")
    with pytest.raises(RecipeError, match="prompts"):
        stage_settings(base, prompts="v9")
    assert thinker_settings(None, None) == ThinkerSettings(source=DEFAULT_THINKER)
    assert thinker_settings(None, "https://host/v1", model="m").endpoint == "https://host/v1"
    assert thinker_settings(ThinkerSettings(source="a"), "b").source == "b"
    with pytest.raises(RecipeError, match="needs model"):
        thinker_settings(None, "https://host/v1")
