"""The search over recipes: every guess fits its budget, the best is written, and what is written merges to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polymerge import Recipe, load_recipe, merge, plan_merge, search_recipe
from polymerge.cli.main import main
from polymerge.errors import RecipeError, TargetError
from polymerge.recipe.rates import tilted
from polymerge.recipe.written import recipe_text
from polymerge.search.choices import Choice, Choices
from polymerge.search.explore import Explored
from tests.tiny import recipe_folder

ROWS = [{"prompt": "w3 w4 w5", "answer": "w6 w7"}, {"prompt": "w8 w9 w10"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe_folder(tmp_path_factory.mktemp("explore"), ROWS, hidden_size=96, intermediate_size=160)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> dict[str, Path]:
    return dict.fromkeys(("e0", "e1"), folder / "prompts.jsonl")


@pytest.fixture(scope="module")
def explored(folder: Path, prompts: dict[str, Path]) -> Explored:
    return search_recipe(folder / "recipe.yaml", "1.6x", prompts, folder / "search", trials=6, embedding_rate=0.9)


def test_every_trial_fits_the_budget_and_is_another(explored: Explored) -> None:
    assert len(explored.trials) == 6
    assert all(trial.point.total_bytes <= explored.limit for trial in explored.trials)
    recipes = {trial.recipe.model_dump_json() for trial in explored.trials}
    assert len(recipes) == 6
    assert explored.best.worst_kl == min(trial.worst_kl for trial in explored.trials)


def test_the_first_trial_has_the_recipes_own_settings(explored: Explored, folder: Path) -> None:
    first, own = explored.trials[0].recipe, load_recipe(folder / "recipe.yaml")
    settled = plan_merge(own).recipe
    assert (first.code, first.scale, first.embeddings) == (settled.code, settled.scale, settled.embeddings)
    assert isinstance(first.compress_rate, float)  # no tilt


def test_the_file_that_is_written_merges_to_the_best(explored: Explored, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(folder / "search" / "recipe.yaml")
    assert recipe == explored.best.recipe
    assert merge(recipe, tmp_path / "bundle").sizes().total == explored.best.point.total_bytes


def test_the_same_seed_makes_the_same_trials(explored: Explored, folder: Path, prompts: dict[str, Path]) -> None:
    again = search_recipe(folder / "recipe.yaml", "1.6x", prompts, folder / "again", trials=3, embedding_rate=0.9)
    assert [trial.choice for trial in again.trials] == [trial.choice for trial in explored.trials[:3]]
    assert [trial.worst_kl for trial in again.trials] == [trial.worst_kl for trial in explored.trials[:3]]


@pytest.mark.parametrize("choice", [Choice("factors", "shared", "average", "keep", tilt=2.0, fill=0.8),
                                    Choice("int4", "per_expert", "keep", "keep", tilt=-1.0)])  # fmt: skip
def test_a_guess_fills_its_share_of_the_budget(choice: Choice, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    limit = int(1.6 * plan_merge(recipe).base_bytes)
    choices = Choices(recipe, limit, ("factors", "int4"))
    plan = choices.plan(choice)
    assert plan is not None
    said = choices.fitting(choice).bytes(plan)
    assert 0.97 * choice.fill * limit < said <= choice.fill * limit
    assert merge(plan.recipe, tmp_path / "bundle").sizes().total <= said  # two experts may share their residuals


def test_a_tilt_keeps_more_of_the_first_layers() -> None:
    assert tilted(0.9, 3, 1.0) == (0.8, 0.9, 0.95)
    assert tilted(0.5, 3, 2.0) == (0.0, 0.5, 0.875)  # nothing is kept twice
    assert tilted(0.9, 3, 0.0) == 0.9 == tilted(0.9, 1, 2.0)


def test_a_recipe_is_written_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    given = load_recipe(
        {
            "experts": {"a": "./model", "b": {"source": "org/b", "revision": "main"}},
            "compress_rate": [0.5, 0.9],
        },
        code="int4",
    )
    (tmp_path / "written.yaml").write_text(recipe_text(given))
    read = load_recipe(tmp_path / "written.yaml")
    assert read.model_copy(update={"experts": given.experts}) == given
    assert read.experts["b"] == given.experts["b"]
    assert read.experts["a"].source == str(tmp_path / "model")


def test_a_budget_that_nothing_fits_is_one_line(folder: Path, prompts: dict[str, Path]) -> None:
    with pytest.raises(TargetError, match="the average and what every expert keeps of its own"):
        search_recipe(folder / "recipe.yaml", "0.5x", prompts, folder / "never")
    with pytest.raises(TargetError, match="a size is written as"):
        search_recipe(folder / "recipe.yaml", "much", prompts, folder / "never")
    with pytest.raises(RecipeError, match="no held-out prompts; give --prompts e1"):
        search_recipe(folder / "recipe.yaml", "2x", {"e0": folder / "prompts.jsonl"}, folder / "never")
    assert not (folder / "never").exists()


def test_the_command_prints_a_table_and_writes_the_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "search"
    words = [str(folder / "recipe.yaml"), "--budget", "1.6x", "--trials", "2", "-o", str(output)]
    given = [f"--prompts={name}={folder / 'prompts.jsonl'}" for name in ("e0", "e1")]
    monkeypatch.setattr("sys.argv", ["polymerge", "search", *words, *given])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"next: polymerge merge {output / 'recipe.yaml'} -o bundle" in shown
    assert len(json.loads((output / "search.json").read_text())["trials"]) == 2
    assert "worst KL, nats a token" in (output / "search.html").read_text()
    written = sorted(path.name for path in output.iterdir() if path.suffix != ".js")
    assert written == ["recipe.yaml", "search.html", "search.json"]


def test_what_makes_no_difference_is_not_tried(folder: Path) -> None:
    """Tied experts have no head of their own."""
    recipe: Recipe = load_recipe(folder / "recipe.yaml")
    options = Choices(recipe, 10**9, ("factors",)).options()
    assert options["code"] == ("factors",)
    tied = json.loads((Path(recipe.experts["e0"].source) / "config.json").read_text())["tie_word_embeddings"]
    assert (len(options["lm_head"]) == 1) is tied
