"""A recipe says what is wrong with it, where, before anything runs."""

from pathlib import Path

import pytest

from polymerge.assess import load_assess_recipe
from polymerge.errors import RecipeError

GOOD = """
candidates:
  math: ./math-model
  code: org/code@v2
thinkers:
  phi: package:phi
fields:
  sums: data/sums.jsonl
  code: [humaneval, tasks/mine.yaml]
merge: {compress_rate: 0.9}
memory_gb: 48
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "assess.yaml"
    file.write_text(text)
    return file


def test_paths_are_taken_from_the_recipes_folder_and_names_stay(tmp_path: Path) -> None:
    recipe = load_assess_recipe(written(tmp_path, GOOD), memory_gb=24)
    assert recipe.candidates["math"].source == str(tmp_path / "math-model")
    assert recipe.candidates["code"].source == "org/code@v2"
    assert recipe.fields == {
        "sums": (str(tmp_path / "data/sums.jsonl"),),
        "code": ("humaneval", str(tmp_path / "tasks/mine.yaml")),
    }
    assert recipe.merge_recipe(["math", "code"]).compress_rate == 0.9
    assert recipe.memory_gb == 24


def test_a_merges_recipe_is_one_too_with_a_folder_of_data(tmp_path: Path) -> None:
    (tmp_path / "data" / "sums").mkdir(parents=True)
    (tmp_path / "data" / "sums" / "test.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    file = written(tmp_path, "experts: {a: org/a, b: org/b}\ncompress_rate: 0.5\nembeddings: average\n")
    recipe = load_assess_recipe(file, tmp_path / "data")
    assert list(recipe.candidates) == ["a", "b"] and list(recipe.fields) == ["sums"]
    planned = recipe.merge_recipe(["a", "b"])
    assert (planned.compress_rate, planned.embeddings) == (0.5, "average")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("memory_gb: 48", "memory: 48"), r"line 11: memory: unknown key; did you mean 'memory_gb'"),
        (("memory_gb: 48", "memory_gb: true"), "line 11: memory_gb: true is not a number"),
        (("memory_gb: 48", "limit: yes"), "line 11: limit: true is not a number"),
        (("memory_gb: 48", "memory_gb: -1"), "line 11: memory_gb: .*greater than 0"),
        (("  phi: package:phi", "  math: package:phi"), "'math' is a candidate and a thinker"),
        (("compress_rate: 0.9", "compress_rate: 9"), "merge: compress_rate: .*less than or equal to 1"),
        (("  math: ./math-model", "  ../x: ./math-model"), "line 2: candidates: expert name '../x'"),
        (("[humaneval, tasks/mine.yaml]", "[]"), "line 9: fields.code: .*at least 1"),
        (("  math: ./math-model", "  math: {source: x, src: y}"), r"line 3: candidates\.math\.src: unknown key"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = written(tmp_path, GOOD.replace(*change))
    with pytest.raises(RecipeError, match=message) as caught:
        load_assess_recipe(file)
    assert "\n" not in str(caught.value)


def test_without_fields_it_says_where_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no fields to assess"):
        load_assess_recipe({"candidates": {"a": "org/a"}})
