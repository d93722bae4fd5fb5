"""`polymerge eval` and `polymerge assess` from end to end, on a tiny bundle that has a tokenizer."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from polymerge.cli.main import main
from polymerge.engine.local.engine import HFEngine
from tests.conftest import Merged
from tests.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMERGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(merged: Merged, tmp_path: Path) -> Path:
    merged_bundle, _ = merged("llama")
    shutil.copytree(merged_bundle.path, tmp_path / "bundle")
    tiny_tokenizer().save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = {
        "e0": [{"prompt": f"w{n} w4", "answer": "w7", "choices": ["w7", "w9 w8"]} for n in range(5, 9)],
        "other": [{"prompt": f"w{n}", "answer": f"w{n}", "kind": "e1"} for n in range(5, 8)],
    }
    for name, samples in rows.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return tmp_path / "data"


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["polymerge", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_several_modes_side_by_side_as_json_and_as_a_file(
    bundle: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    modes = ["--mode", "average", "--mode", "expert:e0", "--mode", "oracle", "--best", "other=e1"]
    code, out, _ = run(
        capsys, monkeypatch, "eval", bundle, "--data", data, *modes, "-o", tmp_path / "out.json", "--json"
    )
    assert code == 0
    printed = json.loads(out)
    assert list(printed["accuracy"]) == ["e0", "other"]
    assert printed["accuracy"]["e0"]["oracle"] == printed["accuracy"]["e0"]["expert:e0"]
    assert printed["modes"]["oracle"]["polymerge"]["answered_by"] == {"e0": {"e0": 4}, "other": {"e1": 3}}
    assert printed["modes"]["oracle"]["n-samples"]["e0"]["effective"] == 4
    whole = json.loads((tmp_path / "out.json").read_text())
    assert whole["modes"]["average"]["configs"]["other"]["output_type"] == "generate_until"
    assert list((tmp_path / "cache" / "answers").glob("*.sqlite"))


def test_some_data_sets_and_a_label_of_the_rows(bundle: Path, data: Path, capsys: Any, monkeypatch: Any) -> None:
    arguments = ["--tasks", "other", "--mode", "oracle", "--label", "kind", "--limit", 2, "--no-cache", "--quiet"]
    code, out, err = run(capsys, monkeypatch, "eval", bundle, "--data", data, *arguments)
    assert code == 0 and "asked" not in err
    assert "oracle, other: e1 2" in out


def test_routed_and_mixture_go_by_the_bundles_own_router(
    bundle: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    for name, words in (("e0", range(5, 15)), ("other", range(60, 70))):
        rows = [json.dumps({"prompt": f"w{n} w{n + 1}", "answer": "w7"}) for n in words]
        (data / name / "train.jsonl").write_text("\n".join(rows) + "\n")
    code, _, err = run(
        capsys, monkeypatch, "router", "fit", bundle, "--data", data, "--assign", "other=e1", "--layers=-1", "--quiet"
    )
    assert code == 0, err
    modes = ["--mode", "routed", "--mode", "mixture"]
    code, out, err = run(capsys, monkeypatch, "eval", bundle, "--data", data, *modes, "--json")
    assert code == 0, err
    notes = {mode: results["polymerge"] for mode, results in json.loads(out)["modes"].items()}
    assert sum(notes["routed"]["answered_by"]["e0"].values()) == 4
    assert set(notes["routed"]["answered_by"]["e0"]) <= {"e0", "e1", "average"}
    assert notes["mixture"]["answered_by"]["other"] == {"mixture": 3}
    assert len(notes["routed"]["router"]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no tasks given; name some with --tasks"),
        (["--tasks", "x.yaml"], "x.yaml: no such task file"),
        (["--tasks", "x.yaml", "--mode", "expert:e9"], "mode expert:e9: no such expert"),
        (["--tasks", "x.yaml", "--apply-chat-template"], "no chat template"),
    ],
)
def test_a_mistake_is_one_line(bundle: Path, capsys: Any, monkeypatch: Any, arguments: list[str], message: str) -> None:
    code, _, err = run(capsys, monkeypatch, "eval", bundle, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_what_is_not_installed_is_said_before_a_model_is_loaded(
    bundle: Path, data: Path, capsys: Any, monkeypatch: Any
) -> None:
    def load(*given: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(HFEngine, "from_bundle", load)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run(capsys, monkeypatch, "eval", bundle, "--data", data)
    assert code == 2 and "evaluation needs lm-eval; pip install -e '.[eval]'" in err


def test_a_bundles_assessment_lies_where_its_router_looks(
    bundle: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    page = tmp_path / "page.html"
    code, out, err = run(capsys, monkeypatch, "assess", bundle, "--data", data, "--limit", 2, "--html", page)
    assert code == 0, err
    assert "average" in out and "1 of 8" in err
    table = json.loads((bundle / "router" / "assessment.json").read_text())["fields"]
    assert set(table) == {"e0", "other"} and set(table["e0"]) == {"e0", "e1", "e2", "average"}
    assert "<h2>Accuracy by field</h2>" in page.read_text()
