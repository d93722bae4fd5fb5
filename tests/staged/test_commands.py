"""The commands of the staged response and the competition, on tiny models."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polymerge import Question, Sample, fit_samples, open_pipeline
from polymerge.cli.main import app
from polymerge.engine.local.engine import HFEngine
from polymerge.errors import PolymergeError, RouterError
from polymerge.router.settings import fit_settings
from tests.conftest import Merged
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def folders(merged: Merged, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny bundle with a tokenizer, and a recipe with a tiny thinker and prompts in the tiny tokenizer's words."""
    merged_bundle, experts = merged("llama")
    folder = tmp_path_factory.mktemp("commands")
    for source, name in ((merged_bundle.path, "bundle"), (experts["e2"], "thinker")):
        shutil.copytree(source, folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for template in ("think.choice", "think.text", "format.choice", "format.text"):
        (folder / f"{template}.jinja").write_text("{{ question }} w9" + " {{ thought }}" * template.startswith("f"))
    (folder / "recipe.yaml").write_text(
        "experts: {a: ./bundle, b: ./bundle}\nthinker: {source: ./thinker}\n"
        "staged: {templates: .}\nmemory_limit: 48 GB\n"
    )
    return str(folder / "bundle"), str(folder / "recipe.yaml")


def run(*words: str) -> str:
    """What the command prints on standard output; its errors are raised."""
    result = CliRunner().invoke(app, [*words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_generate_staged_gives_thought_and_answer_apart(folders: tuple[str, str]) -> None:
    bundle, recipe = folders
    words = ("generate", bundle, "w5 w6", "--staged", "--recipe", recipe, "--expert", "e1", "--max-new-tokens", "4")
    staged = json.loads(run(*words, "--policy", "always", "--thought-tokens", "6", "--json", "--low-memory"))
    assert staged["stage"] == "staged" and staged["thought"] and staged["expert"] == "e1"
    assert staged["tokens"] > staged["thinker_tokens"] > 0
    choice = json.loads(run(*words, "--policy", "always", "--json", "--choice", "w7", "--choice", "w8 w9"))
    assert choice["text"] in ("w7", "w8 w9") and len(choice["scores"]) == 2
    direct = json.loads(run(*words, "--policy", "never", "--json"))
    assert (direct["stage"], direct["reason"]) == ("direct", "the policy is never")
    result = CliRunner().invoke(app, [*words, "--policy", "always", "--show-thoughts", "--thought-tokens", "6"])
    assert staged["thought"].split()[0] in result.stderr and "staged: the policy is always" in result.stderr


def test_what_would_be_ignored_is_refused(folders: tuple[str, str]) -> None:
    bundle, recipe = folders
    with pytest.raises(PolymergeError, match="--recipe needs --staged"):
        run("generate", bundle, "w5", "--recipe", recipe)
    with pytest.raises(PolymergeError, match="leave --temperature out"):
        run("generate", bundle, "w5", "--staged", "--temperature", "1")


def test_stages_measures_and_notes_what_auto_then_follows(folders: tuple[str, str], tmp_path: Path) -> None:
    bundle, recipe = folders
    rows = tmp_path / "e1.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{n}", "answer": "w7 w8"}) + "\n" for n in range(5, 10)))
    words = ("--recipe", recipe, "--thought-tokens", "4", "--no-chat")
    printed = json.loads(run("stages", bundle, f"e1={rows}", *words, "--json", "--quiet", "--max-new-tokens", "4"))
    assert set(printed["fields"]["e1"]["scores"]) == {"direct", "v1", "v2"}
    assert "auto takes" in run("stages", bundle, f"e1={rows}", *words, "--quiet", "--no-save")
    answer = json.loads(run("generate", bundle, "w5", "--staged", "--expert", "e1", *words, "--json"))
    assert "in field 'e1'" in answer["reason"]
    (Path(bundle) / "staged.json").unlink()


def test_the_bundles_router_chooses_where_there_is_one(folders: tuple[str, str], tmp_path: Path) -> None:
    bundle, recipe = folders
    with pytest.raises(RouterError, match="router"):
        run("generate", bundle, "w5", "--staged", "--recipe", recipe, "--expert", "auto")
    routed = tmp_path / "bundle"
    shutil.copytree(bundle, routed)
    (routed / "router").mkdir(exist_ok=True)
    (routed / "router" / "assessment.json").write_text("{}")  # an assessment is no router
    assert open_pipeline(routed, recipe=recipe).steps([Question("w20")])[0].route is None
    samples = [Sample(f"w{number} w{number + 1}", "e1" if number < 40 else "e2") for number in range(10, 70)]
    fitted = fit_samples(routed, HFEngine.from_bundle(routed), samples, settings=fit_settings(layers="-1"))
    fitted.router.save(routed)
    pipeline = open_pipeline(routed, recipe=recipe)
    step = pipeline.steps([Question("w20 w21")])[0]
    assert step.route is not None and step.field in ("e1", "e2") and step.expert in ("e1", "e2", None)
    assert open_pipeline(routed, recipe=recipe, expert="e2").steps([Question("w20")])[0].route is None


def test_compete_writes_a_submission_and_says_what_it_did(folders: tuple[str, str], tmp_path: Path) -> None:
    bundle, recipe = folders
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(
        "id,input,eval_type,answer_choices,target\n0,w5 w6,generation,,w7\n1,w5,multiple_choice,\"['w6', 'w7']\",1\n"
        "2,,generation,,\n"
    )
    words = ("compete", bundle, "--input", str(source), "-o", str(out), "--on-error", "skip", "--max-new-tokens", "4")
    summary = json.loads(run(*words, "--json", "--quiet"))
    assert summary["rows"] == 3 and summary["skipped"] == ["line 4 (id 2): has no input"]
    assert set(summary["scores"]) >= {"accuracy", "rougeLsum"}
    staged = ("--staged", "--policy", "always", "--recipe", recipe, "--thought-tokens", "4", "--overwrite")
    shown = run(*words, *staged)
    assert "staged: 2 rows" in shown and "accuracy" in shown
    with out.open(newline="") as handle:
        assert [row["id"] for row in csv.DictReader(handle)] == ["0", "1", "2"]
    with pytest.raises(PolymergeError, match="--memory-limit: 'much' is not a size"):
        run(*words, "--memory-limit", "much")
