"""Results that cannot be written where they are wanted: one line before the work, and nothing is left there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from polymerge.bundle.place import file_to_write
from polymerge.cli.main import main
from tests.conftest import Merged
from tests.tiny import recipe_folder

PROMPTS = ["--prompts", "e0=prompts.jsonl", "--prompts", "e1=prompts.jsonl"]
FILES = {
    "inspect": ["inspect", "bundle", "--html"],
    "eval": ["eval", "bundle", "--data", "data", "-o"],
    "assess": ["assess", "assess.yaml", "-o"],
    "assess, a page": ["assess", "assess.yaml", "--html"],
}
FOLDERS = {
    "search": ["search", "recipe.yaml", "--budget", "2x", *PROMPTS, "-o"],
    "sweep": ["sweep", "recipe.yaml", *PROMPTS, "-o"],
}
WRONG = {
    **{(name, "bundle"): "bundle: is a folder; name a file to write" for name in FILES},
    **{(name, place): f"{place}: exists, and holds no" for name in FILES for place in ("note.txt", "prompts.jsonl")},
    **{(name, "."): ".: not the name of a folder to make" for name in FILES},
    **{(name, "bundle/x"): "bundle/x: lies in the bundle" for name in FILES},
    **{(name, "note.txt/x"): ": note.txt is a file, so no folder" for name in [*FILES, *FOLDERS]},
    **{(name, place): "lies in the bundle" for name in FOLDERS for place in ("bundle", "bundle/x")},
    **{(name, "note.txt"): "note.txt is a file" for name in FOLDERS},
    **{(name, "locked/x"): "may not be written to; choose another place" for name in [*FILES, *FOLDERS]},
}


@pytest.fixture
def folder(tmp_path: Path, merged: Merged, monkeypatch: pytest.MonkeyPatch) -> Path:
    recipe_folder(tmp_path, [{"prompt": "w3 w4", "answer": "w5"}])
    shutil.copytree(merged("llama")[0].path, tmp_path / "bundle")
    (tmp_path / "note.txt").write_text("mine")
    (tmp_path / "assess.yaml").write_text("candidates: {e0: ./e0, e1: ./e1}\nfields: {a: [prompts.jsonl]}\n")
    (tmp_path / "locked").mkdir()
    monkeypatch.chdir(tmp_path)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    return tmp_path


@pytest.mark.parametrize(("name", "place"), WRONG, ids=str)
def test_it_is_one_line_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, place: str
) -> None:
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("sys.argv", ["polymerge", *{**FILES, **FOLDERS}[name], place])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("polymerge: ") and error.count("\n") == 1, error
    assert WRONG[name, place] in error and sorted(folder.rglob("*")) == before


def test_a_home_is_where_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--html ~/report.html` made a folder of that name here."""
    monkeypatch.setenv("HOME", str(folder / "locked"))
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr("sys.argv", ["polymerge", "inspect", "bundle", "--html", "~/ré port.html"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and (folder / "locked" / "ré port.html").is_file() and not (folder / "~").exists()
    assert f"report: {folder / 'locked' / 'ré port.html'}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_file_is_not_called_a_missing_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setattr("sys.argv", ["polymerge", verb, "note.txt"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "polymerge: note.txt: is a file, and a bundle is a folder with a polymerge.json in it\n"
    )


def test_earlier_results_are_replaced(tmp_path: Path) -> None:
    for text in ("", '{\n "a": 1\n}', "<!doctype html>\n<html>"):
        (tmp_path / "results").write_text(text)
        assert file_to_write(tmp_path / "results") == tmp_path / "results"
