"""Rows are checked with their file and line; metrics are those that the pages name."""

import json
from pathlib import Path

import pytest

from polymerge.errors import RecipeError
from polymerge.evaluate.metrics import is_right, last_number, likeliest, token_f1
from polymerge.evaluate.rows import Row, files_by_name, read_rows


def written(file: Path, *rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_rows_keep_their_order_and_a_limit_takes_the_first(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", *({"prompt": f"q{n}", "answer": n} for n in range(3)), "")
    assert [row.answer for row in read_rows(file)] == ["0", "1", "2"]
    assert [row.prompt for row in read_rows(file, 2)] == ["q0", "q1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a JSON object"),
        ("[1]", "line 2: not a JSON object"),
        ({"prompt": "q"}, "line 2: answer: Field required"),
        ({"prompt": "  ", "answer": "a"}, "line 2: prompt: must not be empty"),
        ({"prompt": "q", "answer": "a", "choices": ["b", "c"]}, "line 2: the answer is not one of the choices"),
        ({"prompt": "q", "answer": "", "choices": ["", "c"]}, "line 2: a choice is empty"),
        ({"prompt": "q", "answer": "a", "final": "many"}, "line 2: final: could not convert"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(tmp_path: Path, line: object, message: str) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": "q", "answer": "a"}, line)
    with pytest.raises(RecipeError, match=message):
        read_rows(file)


def test_missing_and_empty_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(RecipeError, match="holds no rows"):
        read_rows(written(tmp_path / "a.jsonl", ""))
    with pytest.raises(RecipeError, match=r"holds no NAME/test\.jsonl"):
        files_by_name(tmp_path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 + 3 = 15", 15.0),
        ("it is 1,250.5.", 1250.5),
        ("5-3", 3.0),
        ("it fell to -3 degrees", -3.0),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_exact_match_collapses_white_space_and_final_counts_alone() -> None:
    assert is_right(Row(prompt="q", answer="ls  -l"), " ls -l\n")
    assert not is_right(Row(prompt="q", answer="ls -l"), "ls -L")
    assert is_right(Row(prompt="q", answer="12 - 5 = 7", final="7"), "7.0")
    assert not is_right(Row(prompt="q", answer="12 - 5 = 7", final="7"), "seven")


def test_token_f1_counts_words_and_signs() -> None:
    assert token_f1("find . -name x", "find . -name x") == 1.0
    assert token_f1("a b", "a c") == pytest.approx(0.5)
    assert token_f1("a a b", "A") == pytest.approx(0.5)
    assert token_f1("a", "") == 0.0 and token_f1("", "") == 1.0


def test_the_likeliest_choice_with_and_without_its_length() -> None:
    choices = ["a", "a long one"]
    assert likeliest([-2.0, -5.0], choices) == 0
    assert likeliest([-2.0, -5.0], choices, by_length=True) == 1
    assert likeliest([-1.0, -1.0], ["x", "y"]) == 0
