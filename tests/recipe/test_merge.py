import re
from pathlib import Path
from typing import ClassVar

import pytest

from polymerge.errors import RecipeError
from polymerge.recipe.merge import load_recipe
from polymerge.recipe.written import recipe_text

GOOD = "experts:\n  math: ./m\n  code: org/code@v1\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_are_the_published_setting(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert (recipe.compress_rate, recipe.scale, recipe.code, recipe.embeddings, recipe.seed) == (
        0.95,
        "per_expert",
        "auto",
        "auto",
        0,
    )
    assert list(recipe.experts) == ["math", "code"]


def test_relative_paths_are_taken_from_the_recipes_folder(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.experts["math"].source == str(tmp_path / "m")
    assert recipe.experts["code"].source == "org/code@v1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "compres_rate: 0.9\n", ["line 4", "compres_rate", "unknown key", "compress_rate"]),
        (GOOD + "compress_rate: 1.5\n", ["line 4", "compress_rate", "less than or equal to 1"]),
        (GOOD + "compress_rate: nan\n", ["line 4", "compress_rate"]),
        (GOOD + "scale: both\n", ["line 4", "scale", "per_expert"]),
        (GOOD + "workers: 0\n", ["line 4", "workers"]),
        (GOOD + "device: tpu\n", ["line 4", "device"]),
        ("experts:\n  math: a\n", ["line 1", "at least two experts, found 1"]),
        ("experts:\n  math: a\n  math: b\n", ["line 3", "math", "given twice", "line 2"]),
        ("experts:\n  math: a\n  Math: b\n", ["same name"]),
        ("experts:\n  ../up: a\n  b: b\n", ["'../up'", "letters, digits"]),
        ("experts:\n  average: a\n  b: b\n", ["'average'", "reserved"]),
        ("experts:\n  a: {source: x, revison: y}\n  b: z\n", ["line 2", "revison", "unknown key", "revision"]),
        ("experts: [a, b]\n", ["line 1", "experts", "write a mapping of names to sources"]),
        (GOOD + "compres_rate: 0.9\n", ["did you mean 'compress_rate'?"]),
        (GOOD + "xyzzy: 0.9\n", ["line 4", "xyzzy", "known keys", "embeddings"]),
        ("embeddings: keep\n", ["experts", "write a mapping"]),
        ("experts:\n  a: 'x\n", ["line", "not valid YAML"]),
        ("- a\n- b\n", ["the whole file"]),
        ("", ["the whole file"]),
    ],
)
def test_mistakes_are_one_line_with_the_place(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    assert "recipe.yaml" in message
    assert all(word in message for word in words), message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


class TestTheWordPublished:
    EXPERTS: ClassVar = {"math": "org/a", "code": "org/b"}

    def test_stands_for_seven_keys(self) -> None:
        recipe = load_recipe({"experts": self.EXPERTS, "method": "published"})
        assert recipe.adapters == "average" and recipe.code == "factors" and recipe.compress_rate == 0.95
        assert (recipe.scale, recipe.embeddings, recipe.lm_head, recipe.norms) == ("per_expert", "keep", "keep", "keep")

    def test_what_the_recipe_says_itself_counts(self) -> None:
        recipe = load_recipe({"experts": self.EXPERTS, "method": "published", "embeddings": "average", "code": "int8"})
        assert (recipe.embeddings, recipe.code, recipe.adapters) == ("average", "int8", "average")

    def test_beside_a_recipe_it_counts_in_the_place_of_its_own(self) -> None:
        recipe = load_recipe({"experts": self.EXPERTS, "code": "int4"}, method="published", embeddings="average")
        assert (recipe.code, recipe.embeddings, recipe.adapters) == ("factors", "average", "average")

    def test_is_written_as_what_it_stands_for(self, tmp_path: Path) -> None:
        recipe = load_recipe({"experts": self.EXPERTS, "method": "published", "code": "int4"})
        (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
        assert load_recipe(tmp_path / "recipe.yaml") == recipe

    def test_another_word_is_refused(self) -> None:
        with pytest.raises(RecipeError, match=r"recipe: method: Input should be 'published'"):
            load_recipe({"experts": self.EXPERTS, "method": "publish"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("expert: {a: ./a, b: ./b}\n", "line 1: expert: unknown key; did you mean 'experts'?"),
        ("experts:\n  a: ./a\n  b: {sorce: ./b}\n", "line 3: experts.b.sorce: unknown key; did you mean 'source'?"),
        ("experts:\n  a: ./a\n  b: {base: ./b}\n", "line 3: experts.b.source: is missing"),
        ("code: int4\n", "experts: write a mapping of names to sources, a line each: `math: ./math`"),
    ],
)
def test_a_key_that_is_missing_is_looked_for_among_the_unknown_ones(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("key", "read"),
    [("yes", "true or false"), ("1", "a number"), ("1.5", "a number"), ("~", "nothing"), ("2024-01-01", "a date")],
)
def test_a_name_that_yaml_takes_for_something_else_is_to_be_quoted(tmp_path: Path, key: str, read: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"seed: 1\nexperts:\n  a: ./a\n  {key}: ./b\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(file)
    assert str(raised.value) == f"{file}, line 4: experts.{key}: YAML reads {key!r} as {read}; write it in quotes"
    file.write_text(f"experts: {{a: ./a, '{key.replace('~', 'x')}': ./b}}\n")
    assert len(load_recipe(file).experts) == 2


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("thinker", "timeout"),
        ("thinker", "retries"),
        ("thinker", "concurrency"),
        ("staged", "min_confidence"),
        ("staged", "thought_tokens"),
        ("staged", "thought_seconds"),
    ],
)
def test_true_is_not_the_number_1_in_a_section(tmp_path: Path, section: str, key: str) -> None:
    model = "source: ./m, " if section == "thinker" else ""
    text = f"experts: {{a: ./a, b: ./b}}\n{section}: {{{model}{key}: yes}}\n"
    with pytest.raises(RecipeError, match=f"line 2: {section}.{key}: true is not a number"):
        load_recipe(write(tmp_path, text))


def test_a_revision_is_said_once(tmp_path: Path) -> None:
    text = "experts:\n  a: ./a\n  b:\n    source: org/m@v1\n    revision: v2\n"
    with pytest.raises(RecipeError, match=r"line 3: experts\.b: names the revision twice, 'v1' and 'v2'"):
        load_recipe(write(tmp_path, text))
    assert load_recipe(write(tmp_path, text.replace("@v1", ""))).experts["b"].revision == "v2"


@pytest.mark.parametrize("key", ["seed", "workers", "n_oversamples", "n_iter", "max_error", "memory_limit"])
def test_true_is_not_the_number_1(tmp_path: Path, key: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"experts: {{a: ./a, b: ./b}}\n{key}: yes\n")
    with pytest.raises(RecipeError, match=f"line 2: {key}: true is not a number"):
        load_recipe(file)
