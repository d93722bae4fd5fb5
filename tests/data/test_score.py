"""One table of answers, and every judge gives its verdicts."""

import sys
from collections.abc import Callable
from decimal import Decimal
from subprocess import run
from typing import Any

import pytest

from polymerge.assess.measure import AskSettings, measure_rows
from polymerge.data.schema import AnsweredRow
from polymerge.data.score import as_number, credit, is_right, last_number, likeliest, same_object, token_f1
from polymerge.demo import measure
from polymerge.demo.skills import Skill, SkillExample
from polymerge.evaluate import jsonl_tasks
from polymerge.staged import Question
from polymerge.staged.validation import AnsweredQuestion, score

NUMBERS: list[tuple[str, str | None]] = [
    ("12 + 3 = 15", "15"),
    ("42.0", "42"),
    ("0", "0"),
    ("007", "7"),
    # thousands
    ("it is 1,250.5.", "1250.5"),
    ("1,250", "1250"),
    ("1,250,000 in all", "1250000"),
    ("1,25", "25"),  # a list of two
    ("1,2500", "2500"),
    ("1234,567", "567"),
    ("3, 4", "4"),
    # a minus is a sign unless it may be taken from something
    ("it fell to -3 degrees", "-3"),
    ("-3", "-3"),
    ("x=-3", "-3"),
    ("(-3)", "-3"),
    ("\u22123", "-3"),
    ("5\u22123", "3"),
    ("5-3", "3"),
    ("5-3 = 2", "2"),
    ("5 - 3", "3"),
    ("5 - -3", "-3"),
    ("5--3", "-3"),
    ("(4+1)-3", "3"),
    ("50%-3", "3"),
    ("x-3", "3"),
    ("covid-19", "19"),
    ("3\u20135", "5"),  # an en dash is a range
    ("- 3 apples", "3"),
    ("+3", "3"),
    # signs of currencies and percent are not part of a number
    ("$5.00", "5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("€1,250", "1250"),
    ("5€", "5"),
    ("50%", "50"),
    ("-12.5%", "-12.5"),
    # a fraction is an expression like others
    ("3/4", "4"),
    ("3/4 = 0.75", "0.75"),
    # points
    ("It is 7.", "7"),
    ("7...", "7"),
    ("...7", "7"),
    (".5", "0.5"),
    ("=-.5", "-0.5"),
    ("$.50", "0.5"),
    ("end.5", "5"),
    ("version 1.2.3", "3"),
    ("12.05.2024", "2024"),
    # powers of ten
    ("1e3", "1000"),
    ("1.5E-2.", "0.015"),
    ("1e+20", "100000000000000000000"),
    ("3em", "3"),
    ("1e2f", "2"),
    # exact
    ("12345678901234567891", "12345678901234567891"),
    ("0.30", "0.3"),
    ("9" * 5000, "9" * 5000),
    # digits inside words and of other scripts
    ("$42$", "42"),
    (r"\boxed{42}", "42"),
    ("**42**", "42"),
    ("H2O", "2"),
    ("\uff14\uff12", "42"),
    ("5\u00b2", "5"),
    ("none at all", None),
    ("seven", None),
    ("", None),
    ("-", None),
    ("$", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("text", ["42", "-3", " 1,250.5 ", "$5.00", "-$5", "50%", ".5", "1e-05", "\u22123", "0"])
def test_a_number_alone_is_its_own_last_number(text: str) -> None:
    assert as_number(text) == last_number(text) is not None
    assert is_right(text, "", final=text)


@pytest.mark.parametrize("text", ["", "many", "5-3", "3/4", "1 2", "x3", "nan", "inf", "1_000", "--3", "5%%", "1,25"])
def test_more_or_less_than_a_number_is_none(text: str) -> None:
    assert as_number(text) is None


def test_a_long_answer_takes_no_long_time() -> None:
    for text in ("1,111" * 100_000, "-" * 400_000, "1e" * 200_000, "." * 400_000, "$" * 400_000, "1" * 400_000):
        last_number(text)


def test_a_final_that_is_no_number_is_an_error_and_not_a_wrong_answer() -> None:
    with pytest.raises(ValueError, match="'many' is not a number"):
        is_right("many", "many", final="many")


OBJECT = '{"name": "Tom Hill", "n": 2}'
# (right answer, choices, final, what was said, is it right)
VERDICTS: list[tuple[str, tuple[str, ...] | None, str | None, str, bool]] = [
    ("12 - 5 = 7", None, "7", "7.0", True),
    ("12 - 5 = 7", None, "7", "12 - 5 = 7", True),
    ("12 - 5 = 7", None, "7", "12-5", False),
    ("12 - 5 = 7", None, "7", "seven", False),
    ("42", None, "42", "42.0", True),
    ("1250", None, "1250", "that makes 1,250.", True),
    ("1250", None, "1,250", "1250", True),
    ("2", None, "2", "5-3 = 2", True),
    ("3", None, "3", "5-3", True),
    ("3", None, "-3", "5-3", False),
    ("0", None, "0", "5 - 5 = 0", True),
    ("0", None, "0", "5", False),
    ("0", None, "0", "", False),
    ("5", None, "5", "$5.00", True),
    ("50", None, "50", "50%", True),
    ("0.75", None, "0.75", "3/4", False),
    ("ls  -l", None, None, " ls -l\n", True),
    ("ls -l", None, None, "ls -L", False),
    ("ls -l", None, None, "ls-l", False),
    ("42", None, None, "42.0", False),  # without `final` it is a text
    (OBJECT, None, None, '{"n":2.0,"name":"Tom  Hill"}', True),
    (OBJECT, None, None, '{"n": "2", "name": "Tom Hill"}', False),
    (OBJECT, None, None, '{"name": "tom hill", "n": 2}', False),
    (OBJECT, None, None, '{"name": "Tom Hill"}', False),
    (OBJECT, None, None, OBJECT + " as you wished", False),
    (OBJECT, None, None, '{"n": 3, "name": "Tom Hill", "n": 2}', False),
    ('{"n": 1}', None, None, '{"n": true}', False),
    ('{"n": null}', None, None, '{"n": NaN}', False),
    ('{"n": [1, {"m": false}]}', None, None, '{"n":[1,{"m":false}]}', True),
    ('{"n": [1, 2]}', None, None, '{"n": [2, 1]}', False),
    ("{}", None, None, "{ }", True),
    ("{ ls; }", None, None, "{  ls; }", True),
    ('{"n": 1}', None, None, '{"n": ' * 100_000, False),
    ("fees", ("delivery", "fees"), None, "fees", True),
    ("fees", ("delivery", "fees"), None, "delivery", False),
    ("a b", ("a b", "a  b"), None, "a  b", False),  # two choices that differ in white space alone are two
]


def in_assessment(row: AnsweredRow, text: str, tmp_path: Any) -> bool:
    (tmp_path / "a.jsonl").write_text(row.model_dump_json() + "\n")
    measured = measure_rows(Says(text), tmp_path / "a.jsonl", None, AskSettings())  # type: ignore[arg-type]
    return measured.accuracy == 1.0


def in_harness(row: AnsweredRow, text: str, tmp_path: Any) -> bool:
    (tmp_path / "a.jsonl").write_text(row.model_dump_json() + "\n")
    [task] = jsonl_tasks({"a": tmp_path / "a.jsonl"})
    [document] = task["custom_dataset"]()["test"]
    if row.choices:
        return bool(document["choices"][task["doc_to_target"](document)] == text)
    return bool(task["process_results"](document, [text])["exact_match"] == 1.0)


def in_stages(row: AnsweredRow, text: str, tmp_path: Any) -> bool:
    mark = score(AnsweredQuestion(Question(row.prompt, row.choices or ()), row.answer, row.final), text)
    if row.choices or row.final or is_right(text, row.answer):
        return mark == 1.0
    assert mark == token_f1(text, row.answer)  # free text is near or far, and never wrong
    return False


def in_demo(row: AnsweredRow, text: str, tmp_path: Any) -> bool:
    skill = Skill("a", (), (SkillExample(row.prompt, row.answer, row.final),))
    return measure.accuracy(lambda ids, mask, room: ids, Decodes(text), skill) == 1.0


class Says:
    """An engine that writes one text, or finds one choice likeliest."""

    max_length, experts = 100, ()

    def __init__(self, text: str) -> None:
        self.text = text

    def max_length_of(self, expert: Any) -> int:
        return self.max_length

    def chat_prompt(self, messages: Any, *, expert: Any = None, tools: Any = ()) -> list[int]:
        return [1]

    def generate(self, requests: Any) -> list[Any]:
        return [self for _ in requests]

    def loglikelihood(self, requests: Any) -> list[Any]:
        class Value:
            def __init__(self, value: float) -> None:
                self.log_likelihood = value

        return [Value(float(request.continuation == self.text)) for request in requests]


class Decodes:
    """A tokenizer to which every answer is one text."""

    eos_token_id = 0

    def __init__(self, text: str) -> None:
        self.text = text

    def encode(self, text: str, **_: Any) -> list[int]:
        return [1]

    def __call__(self, texts: list[str], **_: Any) -> Any:
        import torch

        return {"input_ids": torch.ones(len(texts), 1), "attention_mask": torch.ones(len(texts), 1)}

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [self.text for _ in rows]


JUDGES: dict[str, Callable[[AnsweredRow, str, Any], bool]] = {
    "judge": lambda row, text, _: is_right(text, row.answer, choices=row.choices, final=row.final),
    "assess": in_assessment,
    "evaluate": in_harness,
    "staged": in_stages,
    "demo": in_demo,
}


@pytest.mark.parametrize("judge", JUDGES)
def test_every_judge_gives_the_same_verdicts(judge: str, tmp_path: Any) -> None:
    wrong = []
    for answer, choices, final, text, right in VERDICTS:
        if choices and judge == "demo":  # it knows no choices
            continue
        row = AnsweredRow(prompt="q", answer=answer, choices=choices, final=final)
        if JUDGES[judge](row, text, tmp_path) is not right:
            wrong.append((answer, final, text))
    assert not wrong


def test_credit_is_all_or_nothing_but_for_free_text() -> None:
    assert credit("5 or 6", "5", final="5") == credit("b", "a", choices=("a", "b")) == 0.0
    assert credit('{"n":2.0}', '{"n": 2}') == 1.0 and credit("a c", "a b") == 0.5


def test_token_f1_counts_words_and_signs() -> None:
    assert token_f1("find . -name x", "find . -name x") == 1.0
    assert token_f1("a c", "a b") == pytest.approx(0.5)
    assert token_f1("A", "a a b") == pytest.approx(0.5)
    assert token_f1("", "a") == 0.0 and token_f1("", "") == 1.0


def test_nothing_is_nothing_but_no_row_may_ask_for_it() -> None:
    assert is_right(" \n", "")
    with pytest.raises(ValueError, match="the answer is empty"):
        AnsweredRow(prompt="q", answer=" ")


def test_the_likeliest_choice_with_and_without_its_length() -> None:
    assert likeliest([-2.0, -5.0]) == 0
    assert likeliest([-2.0, -5.0], [1, 10]) == 1
    assert likeliest([-1.0, -1.0]) == 0


def test_objects_of_different_kinds_are_not_the_same() -> None:
    assert same_object('{"a": 1}', '{"a": 1.0}')
    assert not any(same_object(f'{{"a": {one}}}', f'{{"a": {two}}}') for one, two in (("0", "false"), ("[]", "{}")))
    assert not same_object("[1]", "[1]") and not same_object("3", "3")


def test_the_judge_loads_nothing_heavy() -> None:
    code = "import sys, polymerge.data.score; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
