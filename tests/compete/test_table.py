"""The competition's files: what is read, what is refused and where it stood, and the exact form of a submission."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from polymerge.compete.scoring import rouge, score, target_index
from polymerge.compete.table import BadRow, CompetitionRow, parse_choices, read_table, submission
from polymerge.errors import PolymergeError

DATA = Path(__file__).parents[3] / "shared" / "data" / "competition"
HEAD = "id,input,eval_type,answer_choices\n"
shared = pytest.mark.skipif(not DATA.is_dir(), reason="the competition's files are not beside the repository")


def write(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "test.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@shared
@pytest.mark.parametrize(("name", "rows", "closed"), [("test", 807, 457), ("cosmos_qa", 500, 500), ("xsum", 200, 0)])
def test_the_competitions_own_files_have_no_bad_row(name: str, rows: int, closed: int) -> None:
    table = read_table(DATA / f"{name}.csv")
    assert (len(table.rows), table.bad) == (rows, [])
    assert sum(bool(row.choices) for row in table.good) == closed
    if name != "test":
        assert all(row.target for row in table.good)


@shared
def test_rows_are_those_that_the_csv_module_reads() -> None:
    with (DATA / "test.csv").open(newline="") as handle:
        expected = [(row["id"], row["input"]) for row in csv.DictReader(handle)]
    assert [(row.id, row.text) for row in read_table(DATA / "test.csv").good] == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('1,"",generation,', "no input"),
        ("1,q,essay,", "eval_type is 'essay'"),
        ("1,q,multiple_choice,", "no answer_choices"),
        ("1,q,multiple_choice,None", "no answer_choices"),
        ("1,q,multiple_choice,\"['a', 'b'\"", "not a Python list"),
        ("1,q,multiple_choice,\"__import__('os').getcwd()\"", "not a Python list"),
        ('1,q,multiple_choice,"[f() for f in (print,)]"', "not a Python list"),
        ("1,q,multiple_choice," + "[" * 1000, "not a Python list"),
        ("1,q,multiple_choice," + "-" * 50_000 + "1", "not a Python list"),
        ("1,q,multiple_choice,\"{'a': 1}\"", "not a list of texts"),
        ("1,q,multiple_choice,\"[['a'], ['b']]\"", "not a list of texts"),
        ("1,q,multiple_choice,\"['a', '']\"", "is empty"),
        (f'1,q,multiple_choice,"{[1] * 2000}"', "at most 1000"),
        (f"1,q,multiple_choice,\"['{'x' * 300_000}']\"", "at most 200000 are read"),
        ("1", "too few columns"),
        (",q,generation,", "no id"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_costs_no_other(tmp_path: Path, row: str, reason: str) -> None:
    table = read_table(write(tmp_path, f'{HEAD}0,"two\nlines",generation,\n{row}\n2,q,multiple_choice,"[\'a\']"\n'))
    assert [bad.line for bad in table.bad] == [4]
    assert reason in str(table.bad[0]) and "line 4" in str(table.bad[0])
    assert [row.id for row in table.good] == ["0", "2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"id,input\n1,x\n", ["no column eval_type"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        (None, ["cannot be read", "No such file"]),
    ],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path: Path, content: bytes | None, words: list[str]) -> None:
    file = write(tmp_path, content) if content is not None else tmp_path / "nowhere.csv"
    with pytest.raises(PolymergeError) as caught:
        read_table(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_choices_keep_their_text() -> None:
    assert parse_choices("['a', \"b's\", 3, 1.5, 'ünï ']") == ("a", "b's", "3", "1.5", "ünï ")
    assert parse_choices(" ('a',) ") == ("a",)
    assert all(parse_choices(empty) == () for empty in ("", " ", "None", "nan", "[]"))


def test_a_byte_order_mark_blank_lines_and_another_order_of_columns_are_fine(tmp_path: Path) -> None:
    text = "\ufeffeval_type,id,answer_choices,input,extra\r\ngeneration,7,,hello,x\r\n\r\n"
    assert read_table(write(tmp_path, text)).rows == (CompetitionRow(2, "7", "hello"),)


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    file = write(tmp_path, HEAD + "".join(f"{n},q,generation,\n" for n in range(5)))
    assert len(read_table(file, limit=2).rows) == 2
    assert read_table(write(tmp_path, HEAD)).rows == ()


def test_a_submission_has_the_kits_columns_and_reads_back() -> None:
    texts = ["2", 'a "quoted", text', "two\nlines", "bare\rreturn", "both\r\n", "", "ünï 🦊", "trailing ", "\ud800"]
    data = submission([(str(n), text) for n, text in enumerate(texts)])
    assert data.startswith(b"id,prediction,dummy_field\n0,2,0\n")
    rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    assert [row["prediction"] for row in rows[:-1]] == texts[:-1]
    assert rows[-1]["prediction"] == "\ufffd"
    assert {row["dummy_field"] for row in rows} == {"0"} and list(rows[0]) == ["id", "prediction", "dummy_field"]


def test_scores_are_accuracy_over_choices_and_rouge_over_texts() -> None:
    rows = [
        CompetitionRow(1, "0", "q", ("a", "b"), "1"),
        CompetitionRow(2, "1", "q", ("a", "b"), "a"),
        CompetitionRow(3, "2", "q", (), "a cat sat"),
    ]
    means = score(rows, ["1", "1", "a cat ran"])
    assert means["accuracy"] == 0.5
    assert means["rouge1"] == pytest.approx(2 / 3) and means["rouge2"] == pytest.approx(1 / 2)
    assert means["rougeL"] == pytest.approx(2 / 3)
    assert score([CompetitionRow(1, "0", "q", ("a",))], ["0"]) == {} == score([], [])


@pytest.mark.parametrize(
    ("choices", "target", "index"),
    [(("a", "b"), "1", 1), (("a", "b"), "1.0", 1), (("a", "b"), "b", 1), (("10", "5"), "5", 1), (("a",), "7", None)],
)
def test_a_target_is_an_index_or_a_text(choices: tuple[str, ...], target: str, index: int | None) -> None:
    assert target_index(CompetitionRow(1, "0", "q", choices, target)) == index


def test_rouge_lsum_looks_at_lines() -> None:
    means = rouge([("one two\nthree four", "three four\none two")])
    assert means["rougeLsum"] == 1.0 > means["rougeL"]


def test_a_bad_row_says_which() -> None:
    assert str(BadRow(3, "", "has no id")) == "line 3 (id ?): has no id"
