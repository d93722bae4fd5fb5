"""One rate, one a layer, or one a pattern."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from polymerge import add_expert, inspect_bundle, merge, plan_merge, verify
from polymerge.errors import RecipeError
from polymerge.method.rsvd import rank_for_rate
from polymerge.recipe.merge import Recipe, load_recipe
from polymerge.recipe.rates import in_words, rate_of
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**COMMON, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
EXPERTS = {"a": "./a", "b": "./b"}
Q, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = make_experts("llama", tmp_path_factory.mktemp("e"), count=3, config=LlamaConfig(**TINY))
    return {name: str(path) for name, path in made.items()}


@pytest.mark.parametrize(
    ("rates", "names", "rate"),
    [
        (0.9, ["model.layers.3.x"], 0.9),
        ((0.1, 0.2), ["model.layers.1.x"], 0.2),
        ((0.1, 0.2), ["project_in"], 0.1),
        ({"*.mlp.*": 0.5, "*.0.*": 0.1}, ["model.layers.0.mlp.up_proj"], 0.5),
        ({"*.mlp.*": 0.5, "*.0.*": 0.1}, ["model.layers.0.self_attn.q_proj"], 0.1),
        ({"*.mlp.*": 0.5}, ["model.layers.1.self_attn.q_proj"], 0.95),
        ({"default": 0.7, "*.mlp.*": 0.5}, ["model.layers.1.mlp.up_proj"], 0.5),
        ({"default": 0.7, "*.mlp.*": 0.5}, ["model.layers.1.self_attn.q_proj"], 0.7),
        ({"*.[0-1].*": 0.2}, ["model.layers.1.self_attn.q_proj"], 0.2),
        ({"*q_proj.weight": 0.2}, ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj.weight"], 0.2),
    ],
)
def test_a_matrix_has_the_rate_that_a_reader_would_guess(rates: Any, names: list[str], rate: float) -> None:
    assert rate_of(Recipe(experts=EXPERTS, compress_rate=rates).compress_rate, *names) == rate  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("[]", "empty list"),
        ("[0.5, 1.5]", "number 2: Input should be less than or equal to 1"),
        ("{'*.mlp.*': -1}", "'*.mlp.*': Input should be greater than or equal to 0"),
        ("{}", "a mapping needs patterns"),
        ("much", "'much' is not a number"),
        ("true", "True is not a number"),
        (".inf", "finite"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(written: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"experts: {{a: ./a, b: ./b}}\ncompress_rate: {written}\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(file)
    assert words in str(raised.value) and "line 2: compress_rate: " in str(raised.value)


def test_one_number_is_stored_as_it_always_was(sources: dict[str, str], tmp_path: Path) -> None:
    bundle = merge({"experts": sources, "compress_rate": 1}, tmp_path / "b")
    manifest = json.loads((bundle.path / "polymerge.json").read_text())
    assert manifest["format_version"] == 1 and '"compress_rate": 1.0,' in (bundle.path / "polymerge.json").read_text()


@pytest.mark.parametrize(
    ("rates", "ranks"),
    [
        ([0.9, 0.5], {Q.format(0): 0.9, UP.format(0): 0.9, Q.format(1): 0.5, UP.format(1): 0.5}),
        ({"*.mlp.*": 0.9, "default": 0.5}, {Q.format(0): 0.5, UP.format(0): 0.9, Q.format(1): 0.5, UP.format(1): 0.9}),
    ],
)
def test_every_matrix_has_the_rank_of_its_rate(
    rates: Any, ranks: dict[str, float], sources: dict[str, str], tmp_path: Path
) -> None:
    first = {name: sources[name] for name in ("e0", "e1")}
    bundle = add_expert(
        merge({"experts": first, "code": "factors", "compress_rate": rates}, tmp_path / "b"), "e2", sources["e2"]
    ).bundle
    assert json.loads((bundle.path / "polymerge.json").read_text())["method"]["compress_rate"] == rates
    for module, rate in ranks.items():
        layer = next(layer for layer in bundle.layers.values() if layer.module == module)
        assert layer.rank == rank_for_rate(*layer.matrix_shape, rate)
    assert verify(bundle, sources=True).problems == []
    assert in_words(inspect_bundle(bundle).compress_rate)
    assert plan_merge({"experts": first, "compress_rate": rates}).summary()["compress_rate"] is not None


def test_early_layers_shared_and_late_ones_whole(sources: dict[str, str], tmp_path: Path) -> None:
    bundle = merge({"experts": sources, "compress_rate": [1, 0]}, tmp_path / "b")
    storage = {line["tensor"]: line["storage"] for line in bundle.stats()}
    assert {storage[f"{Q.format(n)}.weight"] for n in (0,)} == {"average"}
    assert storage[f"{Q.format(1)}.weight"] == "full"
    assert verify(bundle, sources=True).problems == []


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ([0.9, 0.9, 0.9], "has 3 numbers, but the model has 2 layers"),
        ({"*.mpl.*": 0.9}, r"the pattern '\*.mpl.\*' matches no matrix, such as 'model.layers.0"),
        ({"*": 0.5, "*.mlp.*": 0.9}, r"the pattern '\*.mlp.\*' is never the first that matches"),
    ],
)
def test_rates_of_another_model_are_refused(rates: Any, words: str, sources: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=words):
        plan_merge({"experts": sources, "compress_rate": rates})


def test_rates_of_another_model_are_refused_with_the_file_and_the_line(sources: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"experts: {json.dumps(sources)}\nseed: 1\ncompress_rate:\n  '*.mpl.*': 0.9\n")
    with pytest.raises(RecipeError, match=r"^.*r\.yaml, line 3: compress_rate: the pattern '\*.mpl.\*' matches no"):
        plan_merge(file)
    with pytest.raises(RecipeError, match=r"^recipe: compress_rate: has 3 numbers"):
        plan_merge(file, compress_rate=[0.9, 0.9, 0.9])


def test_a_target_finds_one_number(sources: dict[str, str], tmp_path: Path) -> None:
    bundle = merge({"experts": sources, "compress_rate": [0.9, 0.5]}, tmp_path / "b", target="size=20x")
    assert isinstance(bundle.manifest.method.compress_rate, float)
