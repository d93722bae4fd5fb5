"""A sweep: every point is a merge that was measured, and the front is what nothing beats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polymerge.cli.main import main
from polymerge.cli.searching import print_sweep
from polymerge.errors import DataError, RecipeError
from polymerge.report.sweep import write_sweep
from polymerge.search.agreement import Agreement
from polymerge.search.examples import read_examples
from polymerge.search.sweep import Point, front, sweep, to_json
from tests.tiny import recipe_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of tiny experts and prompts for them."""
    rows = [{"prompt": "w3 w4 w5", "answer": "w6 w7"}, {"prompt": "w8 w9 w10", "task": "unused"}]
    folder = recipe_folder(tmp_path_factory.mktemp("sweep"), rows)
    with (folder / "prompts.jsonl").open("a") as file:
        file.write("\n")  # blank lines are no rows
    return folder


def point(code: str, total: int, kl: float) -> Point:
    return Point(code, 0.9, total, total, 1.0, 1.0, {"a": Agreement(kl, 1.0, 10)})  # type: ignore[arg-type]


def test_the_front_is_what_no_other_point_beats() -> None:
    best, small = point("int4", 20, 0.1), point("int4", 10, 0.5)
    points = [point("factors", 20, 0.3), best, point("int8", 30, 0.1), small, point("int8", 10, 0.6)]
    assert front(points) == [small, best]


def test_exact_merges_agree_and_lossy_ones_differ(folder: Path, tmp_path: Path) -> None:
    examples = {name: read_examples(folder / "prompts.jsonl") for name in ("e0", "e1")}
    points = sweep(
        folder / "recipe.yaml", examples, tmp_path, rates=[0, 0.8, 1], codes=["factors", "int4"], embedding_rate=0.9
    )
    kl = {(p.compress_rate, p.code): p.kl for p in points}
    assert list(kl) == [(0, "factors"), (0, "int4"), (0.8, "factors"), (0.8, "int4"), (1, "factors")]
    assert kl[0, "factors"] == pytest.approx(0, abs=1e-6) == kl[0, "int4"]
    assert 0 < kl[0.8, "int4"] < kl[0.8, "factors"] < kl[1, "factors"]
    assert {point.tokens for p in points for point in p.experts.values()} == {3 + 2}  # answer and end; prompt but first
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_the_command_prints_and_writes_what_it_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"--prompts={name}={folder / 'prompts.jsonl'}" for name in ("e0", "e1")]
    arguments = [str(folder / "recipe.yaml"), *prompts, "-o", str(tmp_path), "--rates", "0.8", "--json"]
    monkeypatch.setattr("sys.argv", ["polymerge", "sweep", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["points"] == json.loads((tmp_path / "sweep.json").read_text())
    assert [point["code"] for point in printed["points"]] == ["factors", "int8", "int4"]
    assert {"accuracy", "original_accuracy", "kl"} < printed["points"][0]["experts"]["e0"].keys()
    page = (tmp_path / "sweep.html").read_text()
    assert "int4" in page
    assert "<h2>Accuracy</h2>" not in page  # the tiny originals are right on nothing, so there is nothing to keep


def test_accuracies_are_shown_under_their_originals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = {"a": Agreement(0.1, 0.9, 10, accuracy=0.475, original_accuracy=0.95), "b": Agreement(0.1, 0.9, 10)}
    points = [to_json(point, [point]) for point in [Point("int4", 0.9, 10, 10, 1.0, 1.0, experts)]]
    page = write_sweep(points, tmp_path / "sweep.html", footer="")
    cells = (
        "</td><td>".join(["originals", "", "95.0%", "-", ""]),
        "</td><td>".join(["int4", "0.9", "47.5%", "-", "50.0%"]),
    )
    assert all(row in page.read_text() for row in cells)
    print_sweep(points, page)
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["originals", "95.0%", "-"] in lines
    assert ["int4", "0.9", "47.5%", "-", "50.0%"] in lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows; a row is a JSON object with 'prompt'"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"prompt": "a"}\n{"prompt": " "}\n', "line 2: prompt: must not be empty"),
        ('{"prompt": "a", "answer": [3]}\n', "line 1: answer: "),
        ("{\n", "line 1: not a JSON object"),
    ],
)
def test_unusable_prompts_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read_examples(tmp_path / "p.jsonl")


def test_an_expert_without_prompts_is_one_line_before_any_work(folder: Path, tmp_path: Path) -> None:
    examples = {"e0": read_examples(folder / "prompts.jsonl", 1)}
    with pytest.raises(RecipeError, match="expert 'e1': no held-out prompts"):
        sweep(folder / "recipe.yaml", examples, tmp_path / "out")
    with pytest.raises(RecipeError, match="no such expert; the recipe has e0, e1"):
        sweep(folder / "recipe.yaml", {"e0": examples["e0"], "e2": examples["e0"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
