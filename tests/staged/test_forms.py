"""Free, constrained, think-then-constrain: held answers are valid, and of several thoughts the answers vote."""

from collections.abc import Sequence
from typing import Any

import pytest

from polymerge.engine.grammar import has_form
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.structure import Structure, choice_structure, json_structure
from polymerge.staged.formatter import FormatRequest, Formatter, Question
from polymerge.staged.forms import form_of, measure_forms
from polymerge.staged.thought import Thought
from polymerge.staged.validation import AnsweredQuestion, read_questions
from tests.scripted import ScriptedEngine
from tests.tiny import text_model, text_tokenizer


class SeededThinker:
    """Its thought names the seed that it was drawn with."""

    name = fingerprint = "seeded"

    def think(
        self, prompts: Sequence[str], *, max_tokens: int, deadline: float | None = None, seed: int | None = None
    ) -> list[Thought]:
        return [Thought(f"seed {seed}", 1, 1) for _ in prompts]

    def unload(self) -> None: ...


def asked(answer: str, choices: tuple[str, ...] = (), **more: Any) -> AnsweredQuestion:
    return AnsweredQuestion(Question("Which? ", choices, 60), answer, **more)


ROWS = [
    asked("red", ("red", "blue")),
    asked("12", final="12"),
    asked('{"a": true}', schema={"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                                 "additionalProperties": False}),
]  # fmt: skip


def test_a_rows_form_is_its_schema_its_choices_a_number_or_an_object() -> None:
    kinds = [form.kind if (form := form_of(row)) else None for row in [*ROWS, asked('{"b": 1}'), asked("free text")]]
    assert kinds == ["choice", "regex", "json", "json", None]


def test_a_schema_stands_in_a_row(tmp_path: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "q", "answer": "1", "schema": {"type": "integer"}}\n')
    assert read_questions(file)[0].schema == {"type": "integer"}


def test_held_answers_are_always_valid() -> None:
    tokenizer = text_tokenizer()
    engine = HFEngine(text_model(tokenizer), tokenizer, fingerprint="text")
    measured = measure_forms(engine, SeededThinker(), ROWS, votes=[1, 2])
    assert list(measured) == ["free", "constrained", "think 1", "think 2"]
    assert measured["free"].valid < 1
    assert all(measured[way].valid == 1 and measured[way].rows == 3 for way in list(measured)[1:])


def test_most_thoughts_decide_the_earliest_of_equals() -> None:
    def answer(expert: Any, prompt: str) -> str:
        said = {"seed None": "7", "seed 1": "12", "seed 2": "12", "seed 3": "7"}
        return next((text for seed, text in said.items() if seed in prompt), "?")

    measured = measure_forms(ScriptedEngine(answer), SeededThinker(), [asked("12", final="12")], votes=[1, 2, 3, 4])
    right = {way: scores.right for way, scores in measured.items() if way.startswith("think")}
    assert right == {"think 1": 0, "think 2": 0, "think 3": 1, "think 4": 0}


def test_choices_with_a_form_are_written_and_not_scored() -> None:
    engine = ScriptedEngine(lambda expert, prompt: "blue")
    question = Question("Which?", ("red", "blue"), 8, choice_structure(["red", "blue"]))
    [answer] = Formatter(engine).answer([FormatRequest(question, "Which?")])
    assert answer.text == "blue" and answer.index is None
    assert engine.asked[0].structure == question.structure


@pytest.mark.parametrize(
    ("form", "text", "right"),
    [
        (Structure("regex", r"\d+"), "12", True),
        (Structure("regex", r"\d+"), "12 ", False),
        (choice_structure(["a", "ab"]), "ab", True),
        (choice_structure(["a", "ab"]), "abc", False),
        (json_structure({"type": "integer"}), "3", True),
        (json_structure({"type": "integer"}), '"3"', False),
        (json_structure({"type": "object"}), '{"ä": [1', False),
    ],
)
def test_a_text_has_a_form_or_not(form: Structure, text: str, right: bool) -> None:
    assert has_form(form, text) is right
