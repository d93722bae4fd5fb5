"""Rows keep what stands in them, errors name their line, and no consumer has a reader of its own."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import polymerge
from polymerge.data.rows import content_hash, files_by_name, read_lines, read_rows, read_whole_rows
from polymerge.data.schema import AnsweredRow, ExampleRow, PromptRow, read_all, read_as
from polymerge.demo.skills import read_skills
from polymerge.errors import DataError
from polymerge.evaluate import jsonl_tasks
from polymerge.export.vllm.prompts import read_prompts
from polymerge.router.samples import read_fields, read_labelled
from polymerge.search.examples import read_examples
from polymerge.staged.validation import read_questions

# Line ends to str.splitlines; from \x0b on JSON wants them escaped.
INSIDE = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"


def written(file: Path, *rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    file.write_bytes(text.encode())
    return file


def prompts_of_a_task(file: Path) -> list[str]:
    [task] = jsonl_tasks({"a": file})
    return [row["prompt"] for row in task["custom_dataset"]()["test"]]


CONSUMERS: dict[str, Callable[[Path], list[str]]] = {
    "sweep": lambda file: [example.prompt for example in read_examples(file)],
    "export": lambda file: [prompt.prompt for prompt in read_prompts(file)],
    "staged": lambda file: [asked.question.text for asked in read_questions(file)],
    "demo": lambda file: [e.prompt for e in read_skills(file.parent.parent, None, train=9, test=9)[0].test],
    "evaluate": prompts_of_a_task,
    "assess": lambda file: [row.prompt for row in read_all(AnsweredRow, file)],
    "router": lambda file: [sample.text for sample in read_fields(file.parent.parent, "test", fields=["a"])],
    "router, labelled": lambda file: [sample.text for sample in read_labelled(file, "field")],
    "route": lambda file: [row.prompt for _, row in read_as(PromptRow, file)],
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_row_with_other_line_ends_inside_is_one_row_to_every_reader(tmp_path: Path, consumer: str) -> None:
    prompts = ["a\u2028b\u2029c\x85d", "q"]
    rows = [{"prompt": prompt, "answer": "w", "field": "a"} for prompt in prompts]
    for name in ("a", "b"):
        for split in ("train", "test"):
            file = written(tmp_path / name / f"{split}.jsonl", *rows)
    assert CONSUMERS[consumer](tmp_path / "a" / file.name) == prompts


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_every_reader_names_the_file_and_the_line(tmp_path: Path, consumer: str) -> None:
    good = {"prompt": "q", "answer": "w", "field": "a"}
    for name in ("a", "b"):
        for split in ("train", "test"):
            file = written(tmp_path / name / f"{split}.jsonl", good, "", '{"prompt": "q"')
    file = tmp_path / "a" / file.name
    with pytest.raises(DataError, match="line 3: not a JSON object") as raised:
        CONSUMERS[consumer](file)
    assert str(raised.value).startswith(str(tmp_path / "a")) and "\n" not in str(raised.value)


def test_nobody_else_reads_json_lines() -> None:
    """The worker of an assessment is a stream, not a file of rows."""
    expected = {"assess/process.py", "data/rows.py"}
    source = Path(polymerge.__file__).parent
    loads = re.compile(r"json\.loads\(line|json\.loads\(.*\) for .* in ")
    readers = {str(file.relative_to(source)) for file in source.rglob("*.py") if loads.search(file.read_text())}
    assert readers == expected


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path, end: str, mark: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes((mark + end.join(['{"a": 1}', "", " \t", '{"a": 2}'])).encode())
    assert list(read_rows(file)) == [(1, {"a": 1}), (4, {"a": 2})]
    assert [line for line, _ in read_lines(file)] == [1, 4]
    assert [text for _, text in read_lines(file)] == ['{"a": 1}', '{"a": 2}']


def test_controls_escaped_in_a_text_come_back(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": INSIDE, "smile": "\U0001f600"}) + "\n")
    assert list(read_rows(file)) == [(1, {"prompt": INSIDE, "smile": "\U0001f600"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not a JSON object: Expecting property name .*column 2"),
        (b"[1]", "not a JSON object; a row looks like"),
        (b"null", "not a JSON object"),
        (b'{"a": 1} {"a": 2}', "Extra data"),
        (b'{"a": 1}\r{"a": 2}', "Extra data"),
        (b'{"a": NaN}', "NaN is not JSON; write null"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": "b\x0bc"}', "Invalid control character"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8 text; save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text|not a JSON object"),
    ],
)
def test_what_is_no_row_is_refused_in_one_line(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 0}\n' + line + b"\n")
    rows = read_rows(file)
    assert next(rows) == (1, {"a": 0})  # it streams: what is wrong further on is not known yet
    with pytest.raises(DataError, match=f"line 2: .*{message}|line 2: {message}") as raised:
        list(rows)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("read", [lambda file: list(read_rows(file)), read_whole_rows, content_hash])
@pytest.mark.parametrize(
    ("name", "message"), [("none", "No such file"), (".", "Is a directory"), ("a\0b", "null byte")]
)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, read: Callable[[Path], Any], name: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"cannot be read: .*{message}"):
        read(tmp_path / name)


@pytest.mark.parametrize("last", [b'{"a": 3', b'{"a": 3}', b"", b'{"a": \xff\n{"a": 3}\n', b"[3]\n"])
def test_a_journal_is_read_up_to_where_it_was_cut(tmp_path: Path, last: bytes) -> None:
    file = tmp_path / "journal"
    file.write_bytes(b'{"a": NaN}\n{"a": "\\ud800"}\n' + last)
    first, second = read_whole_rows(file)
    assert first["a"] != first["a"] and second == {"a": "\ud800"}


def test_data_sets_of_a_folder_by_name_and_their_hashes(tmp_path: Path) -> None:
    files = [written(tmp_path / name / "test.jsonl", {"prompt": name}) for name in ("b", "a")]
    assert files_by_name(tmp_path) == {"a": files[1], "b": files[0]}
    assert content_hash(files[0]) != content_hash(files[1]) and len(content_hash(files[0])) == 64
    with pytest.raises(DataError, match=r"holds no NAME/train\.jsonl"):
        files_by_name(tmp_path, "train")


def test_rows_keep_their_order_and_a_limit_takes_the_first(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", *({"prompt": f"q{n}", "answer": n} for n in range(3)), "", "broken")
    assert [row.answer for row in read_all(AnsweredRow, file, 3)] == ["0", "1", "2"]
    assert [row.prompt for row in read_all(AnsweredRow, file, 2)] == ["q0", "q1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "answer: is missing"),
        ({"answer": "a"}, "prompt: is missing"),
        ({"prompt": "q", "answer": None}, "answer: Input should be a valid string"),
        ({"prompt": "q", "answer": True}, "answer: Input should be a valid string"),
        ({"prompt": "q", "answer": ["a"]}, "answer: Input should be a valid string"),
        ({"prompt": "  ", "answer": "a"}, "prompt: must not be empty"),
        ({"prompt": 3, "answer": "a"}, "prompt: Input should be a valid string"),
        ({"prompt": "q", "answer": "a", "choices": ["b", "c"]}, "the answer is not one of the choices"),
        ({"prompt": "q", "answer": "", "choices": ["", "c"]}, "a choice is empty"),
        *(
            ({"prompt": "q", "answer": "a", "final": final}, "final: must be a number, like 42, -3 or 1,250.5")
            for final in ("many", "", "3/4", "5-3", "nan", "1 2", "1_000")
        ),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(tmp_path: Path, row: object, message: str) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": "q", "answer": "a"}, row)
    with pytest.raises(DataError, match=f"a.jsonl, line 2: {re.escape(message)}"):
        read_all(AnsweredRow, file)


def test_numbers_are_texts_and_nothing_is_not_missing(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": "q", "answer": 0, "final": 0, "choices": [0, 1.5], "field": 0})
    [row] = read_all(AnsweredRow, file)
    assert (row.answer, row.final, row.choices, row.text("field")) == ("0", "0", ("0", "1.5"), "0")
    assert [e.answer for e in read_examples(file)] == [p.answer for p in read_prompts(file)] == ["0"]
    assert [s.answer for s in read_labelled(file, "field")] == ["0"]
    for name in ("a", "b"):
        for split in ("train", "test"):
            written(tmp_path / "skills" / name / f"{split}.jsonl", file.read_text().strip())
    [skill, _] = read_skills(tmp_path / "skills", None, train=1, test=1)
    assert (skill.test[0].answer, skill.test[0].final) == ("0", "0")


def test_no_answer_no_choices_and_no_final_are_none(tmp_path: Path) -> None:
    nothing = {"prompt": "q", "answer": None}
    file = written(tmp_path / "a.jsonl", nothing)
    assert read_all(ExampleRow, file) == [ExampleRow(prompt="q")]
    assert [e.answer for e in read_examples(file)] == [""] and [p.answer for p in read_prompts(file)] == [None]
    assert [s.answer for s in read_fields(written(tmp_path / "d/f/test.jsonl", nothing).parents[1], "test")] == [""]
    file = written(tmp_path / "b.jsonl", {"prompt": "q", "answer": "a", "choices": None, "final": None})
    assert (read_all(AnsweredRow, file)[0].choices, read_all(AnsweredRow, file)[0].final) == (None, None)


def test_a_file_without_rows_says_what_a_row_is(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", "")
    with pytest.raises(DataError, match="holds no rows; a row is a JSON object with 'prompt' and 'answer'"):
        read_all(AnsweredRow, file)
