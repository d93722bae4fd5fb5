"""How words are read, and experts without a recipe in the verbs that take one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import polymerge
from polymerge.cli.main import main
from polymerge.cli.words import read_list, read_numbers, read_pairs, read_recipe
from polymerge.errors import PolymergeError, RecipeError
from tests.merging.test_run import content
from tests.tiny import recipe_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["polymerge", *map(str, words)])
        with pytest.raises(SystemExit) as raised:
            main()
        said = capsys.readouterr()
        return int(raised.value.code or 0), said.out, said.err

    return call


def test_one_word_is_a_recipe_and_pairs_are_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_recipe(["recipe.yaml"]) == Path("recipe.yaml")
    assert read_recipe(["math=./m", "code=org/c@v1"]) == {"math": "./m", "code": "org/c@v1"}
    assert read_recipe(["a=x=y", "b=z"]) == {"a": "x=y", "b": "z"}
    monkeypatch.chdir(tmp_path)
    assert read_recipe(["rate=0.9.yaml"]) == {"rate": "0.9.yaml"}
    (tmp_path / "rate=0.9.yaml").touch()
    assert read_recipe(["rate=0.9.yaml"]) == Path("rate=0.9.yaml")


def test_words_that_are_neither_are_refused() -> None:
    for words in (["recipe.yaml", "math=./m"], ["math=./m", "./c"], ["a.yaml", "b.yaml"]):
        with pytest.raises(RecipeError, match="give one recipe, a YAML file, or NAME=SOURCE for every expert"):
            read_recipe(words)
    for word in ("=x", "a=", "a"):
        with pytest.raises(RecipeError, match=f"'{word}' is not FIELD=FILE"):
            read_pairs([word], "FIELD=FILE")
    with pytest.raises(RecipeError, match="'a' is given twice, as 'x' and 'y'"):
        read_pairs(["a=x", "b=z", "a=y"])
    assert read_pairs(None) == {}


def test_lists_and_numbers() -> None:
    assert (read_list(None), read_list("a, b"), read_numbers("0.9,1", "--rates")) == (None, ["a", "b"], [0.9, 1.0])
    with pytest.raises(RecipeError, match="--rates '1,x': not numbers separated by commas"):
        read_numbers("1,x", "--rates")


def test_a_merge_of_pairs_gives_the_bytes_of_a_recipe(
    checkpoints: Callable[[str], dict[str, Path]], tmp_path: Path, run: Run
) -> None:
    experts = {name: str(path) for name, path in checkpoints("llama").items()}
    pairs = [f"{name}={source}" for name, source in experts.items()]
    code, out, err = run("merge", *pairs, "-o", tmp_path / "a", "--compress-rate=0.8", "--code=int8", "--norms=average")
    assert code == 0 and "3 experts in" in " ".join(out.split()), err
    keys = {"compress_rate": 0.8, "code": "int8", "norms": "average"}
    same = polymerge.merge({"experts": experts, **keys}, tmp_path / "b")
    assert content(tmp_path / "a") == content(same.path)
    assert content(polymerge.merge(experts, tmp_path / "c", **keys).path) == content(same.path)  # type: ignore[arg-type]
    planned = json.loads(run("plan", *pairs, "--compress-rate=0.8", "--code=int8", "--json")[1])
    assert planned["code"] == "int8" and planned["compress_rate"] == 0.8
    assert planned == json.loads(run("plan", *pairs, "--json", "--code=int8", "--compress-rate=0.8")[1])


def test_a_sweep_of_pairs(tmp_path: Path, run: Run) -> None:
    folder = recipe_folder(tmp_path, [{"prompt": "w3 w4 w5"}])
    words = [
        f"{name}={source.source}" for name, source in polymerge.load_recipe(folder / "recipe.yaml").experts.items()
    ]
    words += [f"--prompts={name}={folder / 'prompts.jsonl'}" for name in ("e0", "e1")]
    code, out, err = run("sweep", *words, "--rates=0.9", "--codes=factors", "--scale=shared", "-o", tmp_path, "--json")
    assert code == 0, err
    assert [point["compress_rate"] for point in json.loads(out)["points"]] == [0.9]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["math=./m"], "recipe: experts: a merge needs at least two experts, found 1"),
        (["math=./m", "math=./n"], "'math' is given twice, as './m' and './n'"),
        (["math=./m", "recipe.yaml"], "recipe.yaml: give one recipe"),
        (["math=./m", "code="], "'code=' is not NAME=SOURCE"),
        (["auto=./m", "code=./c"], "expert name 'auto' is reserved"),
        (["math=./m", "code=./c", "--norms=drop"], "recipe: norms: Input should be 'keep' or 'average'"),
        (["math=./nowhere", "code=./c"], "./nowhere: no such folder or file"),
        (["nowhere.yaml"], "nowhere.yaml: cannot read the recipe"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "merge"])
def test_a_mistake_is_one_line(verb: str, words: list[str], said: str, tmp_path: Path, run: Run) -> None:
    code, _, err = run(verb, *words, *(["-o", tmp_path / "b"] if verb == "merge" else []))
    assert code == 2 and err.startswith("polymerge: ") and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_expert_is_added_as_a_pair_or_not_at_all() -> None:
    from polymerge.cli.add import add

    with pytest.raises(PolymergeError, match=r"'\./m' is not NAME=SOURCE"):
        add(Path("bundle"), "./m")
