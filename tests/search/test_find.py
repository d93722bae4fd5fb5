"""The search for a target: the smallest bundle that reaches it, in few merges, and one line where none does."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from polymerge import Bundle, load_recipe, merge, plan_merge
from polymerge.cli.main import main
from polymerge.errors import RecipeError, TargetError
from polymerge.merging.plan import MergePlan
from polymerge.search import find as searching
from polymerge.search.agreement import Agreement, Reference
from polymerge.search.examples import Example
from polymerge.search.find import find
from polymerge.search.fitting import Fitting
from polymerge.search.sweep import Point
from tests.killed import content
from tests.tiny import recipe_folder

ROWS = [{"prompt": "w3 w4 w5", "answer": "w6 w7"}, {"prompt": "w8 w9 w10"}]
EXAMPLES = {name: [Example("w3 w4 w5", "w6 w7"), Example("w8 w9 w10")] for name in ("e0", "e1")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of tiny experts and prompts for them; not so tiny that files are headers in the main."""
    return recipe_folder(tmp_path_factory.mktemp("search"), ROWS, hidden_size=96, intermediate_size=160)


class Bench:
    """In the place of merges and measurements: quality as a function of what is kept, and a list of what was asked."""

    def __init__(self, quality: Callable[[MergePlan], Mapping[str, Agreement]]) -> None:
        self.quality = quality
        self.asked: list[tuple[float, str]] = []

    def measure(self, plan: MergePlan, references: Any, place: Any, executor: Any, calibration: Any) -> Point:
        recipe = plan.recipe
        self.asked.append((recipe.compress_rate, recipe.code))
        return Point(recipe.code, recipe.compress_rate, 0, 0, 1.0, 0.0, self.quality(plan))


def scripted(monkeypatch: pytest.MonkeyPatch, kl: Callable[[MergePlan], float], kept: float = 1.0) -> Bench:
    """`kl(plan)` of expert e0; e1 has a tenth of it. From a KL of 0.01 on e0 keeps `kept` of its accuracy."""

    def quality(plan: MergePlan) -> dict[str, Agreement]:
        worst = kl(plan)
        share = 1.0 if worst < 0.01 else kept
        return {"e0": Agreement(worst, 1.0, 9, share, 1.0), "e1": Agreement(worst / 10, 1.0, 9, 1.0, 1.0)}

    bench = Bench(quality)
    monkeypatch.setattr(searching, "measure", bench.measure)
    monkeypatch.setattr(searching, "run_originals", lambda recipe, examples, say: {n: Original() for n in examples})
    return bench


class Original(Reference):
    def __init__(self) -> None:
        self.accuracy = 1.0


def rank_share(plan: MergePlan) -> float:
    linear = [task for task in plan.tasks if task.record.role == "linear"]
    full = sum(min(task.matrix_shape) for task in linear)
    return sum(min(task.matrix_shape) if task.treatment == "full" else task.rank for task in linear) / full


def falling(plan: MergePlan) -> float:
    """The more rank the better, so int4 is best at equal bytes; it has a floor."""
    return 0.5 / (1 + 100 * rank_share(plan)) + (1e-3 if plan.recipe.code == "int4" and rank_share(plan) else 0)


@pytest.mark.parametrize("goal", [0.3, 0.05, 0.015, 0.008])
def test_no_smaller_bundle_beyond_the_tolerance_reaches_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, goal: float
) -> None:
    bench = scripted(monkeypatch, falling)
    recipe = load_recipe(folder / "recipe.yaml")
    result = find(recipe, f"kl={goal}", EXAMPLES, tolerance=0.001)
    assert result.recipe.code == "int4"
    fitting = Fitting.of(plan_merge(recipe))
    least = bisect_left(range(10_000), True, key=lambda keep: falling(fitting.at(keep, "int4")) <= goal)
    smallest = fitting.at(least, "int4")
    chosen = plan_merge(result.recipe)
    assert falling(chosen) <= goal
    assert fitting.bytes(smallest) <= fitting.bytes(chosen) <= 1.001 * fitting.bytes(smallest)
    assert len(bench.asked) == result.merges == len(set(bench.asked)) <= 14


def test_a_loose_target_takes_the_average_and_one_merge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = scripted(monkeypatch, falling)
    result = find(folder / "recipe.yaml", "kl=1", EXAMPLES, codes=["int4", "factors"])
    assert (result.recipe.compress_rate, result.recipe.code, result.merges) == (1.0, "factors", 1)
    assert bench.asked == [(1.0, "factors")]


def test_under_the_floor_of_one_code_the_next_one_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda plan: 0.0 if plan.recipe.code == "int8" and rank_share(plan) > 0.5 else falling(plan))
    result = find(folder / "recipe.yaml", "kl=0.0005", EXAMPLES)
    assert result.recipe.code == "int8"
    assert 0.5 < rank_share(plan_merge(result.recipe)) < 0.6


def test_what_only_whole_experts_reach_is_one_line_that_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = scripted(monkeypatch, falling)
    with pytest.raises(TargetError, match="only compress_rate 0, which keeps every expert whole") as stopped:
        find(folder / "recipe.yaml", "kl=1e-7", EXAMPLES)
    assert "\n" not in str(stopped.value)
    assert len(bench.asked) <= 14
    assert all(rate > 0 for rate, _ in bench.asked)


def test_accuracy_is_what_the_worst_expert_keeps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, falling, kept=0.9)
    assert find(folder / "recipe.yaml", "accuracy=90%", EXAMPLES).recipe.compress_rate == 1.0
    result = find(folder / "recipe.yaml", "accuracy=99%", EXAMPLES, tolerance=0.001)
    assert 0.008 < falling(plan_merge(result.recipe)) < 0.01


@pytest.mark.parametrize("rate", [0, 0.0001, 0.5, 0.99999, 1])
def test_the_recipes_rate_is_where_it_starts_and_no_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    bench = scripted(monkeypatch, falling)
    recipe = load_recipe(folder / "recipe.yaml").model_dump() | {"compress_rate": rate}
    result = find(recipe, "kl=0.05", EXAMPLES, tolerance=0.001)
    assert 0.035 < falling(plan_merge(result.recipe)) <= 0.05
    assert result.point and result.point.compress_rate == result.recipe.compress_rate
    assert all(asked > 0 for asked, _ in bench.asked)


def test_one_code_is_not_compared_with_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = scripted(monkeypatch, falling)
    assert find(folder / "recipe.yaml", "kl=0.1", EXAMPLES, codes=["int8"]).recipe.code == "int8"
    assert {code for _, code in bench.asked} == {"int8"}


@pytest.mark.parametrize("limit", ["size=1.3x", "size=1.1x", "size=1MB"])
@pytest.mark.parametrize("codes", [["factors"], ["factors", "int8", "int4"]])
def test_a_size_is_honoured_and_used(folder: Path, tmp_path: Path, limit: str, codes: list[str]) -> None:
    recipe = load_recipe({**load_recipe(folder / "recipe.yaml").model_dump(), "embeddings": "average",
                          "lm_head": "average"})  # fmt: skip
    result = find(recipe, limit, codes=codes)
    assert result.merges == 0 and result.limit
    bundle = merge(result.recipe, tmp_path / "bundle")
    result.check(bundle)
    assert 0.8 * result.limit < bundle.sizes().total <= result.limit  # tiny files are headers to a fifth
    assert result.recipe.code in codes


def test_sizes_from_the_average_to_whole_experts(folder: Path) -> None:
    whole = {"embeddings": "keep", "lm_head": "keep"}
    recipe = load_recipe({**load_recipe(folder / "recipe.yaml").model_dump(), **whole})
    assert find(recipe, "size=9x").recipe.compress_rate == 0
    assert find(recipe, "size=9x").recipe.code == "factors"  # of which there are none
    with pytest.raises(TargetError, match="the average and what every expert keeps of its own"):
        find(recipe, "size=1x")
    with pytest.raises(TargetError, match="a size needs no prompts"):
        find(recipe, "size=2x", EXAMPLES)
    plan = plan_merge(load_recipe(recipe))
    fitting = Fitting.of(plan)
    generous = fitting.bytes(fitting.at(9000, "int8"))  # int4 could not use it
    assert find(recipe, f"size={generous}", codes=["int4", "int8", "factors"]).recipe.code != "int4"


def test_a_bundle_over_its_size_is_told(folder: Path, tmp_path: Path) -> None:
    result = find(folder / "recipe.yaml", "size=2x")
    bundle = merge({**result.recipe.model_dump(), "compress_rate": 0}, tmp_path / "bundle")
    with pytest.raises(TargetError, match="more than the target; the bundle stays"):
        result.check(bundle)


def test_prompts_are_checked_before_any_work(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    with pytest.raises(RecipeError, match="expert 'e0': no held-out prompts"):
        find(recipe, "kl=0.1")
    with pytest.raises(RecipeError, match="--prompts e7: no such expert"):
        find(recipe, "kl=0.1", EXAMPLES | {"e7": EXAMPLES["e0"]})
    with pytest.raises(TargetError, match="none of the prompts of expert 'e0' has an answer"):
        find(recipe, "accuracy=0.9", {name: [Example("w3 w4")] for name in EXAMPLES})
    with pytest.raises(RecipeError, match="code"):
        find(recipe, "kl=0.1", EXAMPLES, codes=["int5"])


def test_an_original_without_accuracy_has_none_to_keep(folder: Path) -> None:
    with pytest.raises(TargetError, match="the original of 'e0' is right on none of its prompts"):
        find(folder / "recipe.yaml", "accuracy=0.9", EXAMPLES)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["polymerge", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def visible(folder: Path) -> list[str]:
    """What is in a folder, but for locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_the_command_writes_what_a_merge_with_the_found_values_writes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With real merges and measurements. `max_error` counts for the bundle alone, not for guesses."""
    recipe = load_recipe(folder / "recipe.yaml").model_dump() | {"max_error": 1.0, "compress_rate": 0.9}
    (tmp_path / "recipe.yaml").write_text(json.dumps({k: v for k, v in recipe.items() if v is not None}))
    average = find(recipe, "kl=100", EXAMPLES)
    assert average.point
    goal = max(agreement.kl for agreement in average.point.experts.values()) / 2
    prompts = [f"--prompts={name}={folder / 'prompts.jsonl'}" for name in ("e0", "e1")]
    output = tmp_path / "deep" / "bundle"
    assert not run(
        monkeypatch,
        tmp_path / "recipe.yaml",
        "-o",
        output,
        f"--target=kl={goal}",
        *prompts,
        "--codes=factors,int4",
        "--json",
    )
    printed = json.loads(capsys.readouterr().out)
    search = printed["search"]
    assert (search["compress_rate"], search["code"]) == (printed["compress_rate"], printed["code"])
    assert 0 < max(agreement["kl"] for agreement in search["point"]["experts"].values()) <= goal
    again = merge(
        recipe | {key: search[key] for key in ("compress_rate", "code", "embeddings", "lm_head")}, tmp_path / "again"
    )
    assert content(output) == content(again.path)
    assert Bundle.open(output).manifest.method.compress_rate == search["compress_rate"]
    assert visible(tmp_path) == ["again", "deep", "recipe.yaml"]
    assert visible(output.parent) == ["bundle"]


def test_the_command_prints_how_to_repeat_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [folder / "recipe.yaml", "-o", tmp_path / "b", "--target"]
    assert not run(monkeypatch, *common, "size=2.5x", "--codes", "int4")
    printed = capsys.readouterr()
    assert "repeat: polymerge merge" in printed.out and "--code int4" in printed.out
    assert "found: compress rate" in printed.err
    assert run(monkeypatch, *common, "size=2.5x") == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    assert not run(monkeypatch, *common, "size=2.2x", "--overwrite", "--quiet")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "kl=0"], "only compress_rate 0 has a KL of 0"),
        (["--target", "accuracy=150%"], "over 0% and at most 100%"),
        (["--target", "kl=0.1"], "no held-out prompts; give --prompts e0=FILE.jsonl"),
        (["--target", "size=1kB"], "the average and what every expert keeps of its own"),
        (["--target", "kl=0.1", "--code", "int4"], "--code is what --target finds"),
        (["--codes", "int4"], "--codes belongs to --target"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert run(monkeypatch, folder / "recipe.yaml", "-o", tmp_path / "bundle", *arguments) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
