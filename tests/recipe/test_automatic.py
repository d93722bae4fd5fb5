"""What `auto` stands for, and that a bundle of adapters is exact without a word in the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polymerge import merge
from polymerge.errors import RecipeError
from polymerge.merging.plan import plan_merge
from polymerge.recipe.automatic import settled
from polymerge.recipe.merge import Recipe, load_recipe
from polymerge.search.find import find
from tests.sources.peft_oracle import write_adapter
from tests.tiny import make_experts, tiny_tokenizer

EXPERTS = {"math": "org/a", "code": "org/b"}


def chosen(adapters: bool = False, **settings: Any) -> tuple[str, str, str]:
    recipe: Recipe = settled(load_recipe({"experts": EXPERTS, **settings}), adapters=adapters)
    return recipe.code, recipe.embeddings, recipe.lm_head


def test_fine_tunes_have_int4_and_compressed_tables() -> None:
    assert chosen() == ("int4", "compress", "compress")
    assert chosen(compress_rate=0.5) == ("int4", "compress", "compress")
    assert chosen(compress_rate={"default": 0.9, "layers.0": 1.0}) == ("int4", "compress", "compress")


def test_adapters_are_exact() -> None:
    assert chosen(adapters=True) == ("factors", "keep", "keep")


@pytest.mark.parametrize("rate", [0, 1])
def test_where_nothing_is_factorised_tables_are_whole(rate: float) -> None:
    assert chosen(compress_rate=rate) == ("factors", "keep", "keep")


def test_what_the_recipe_says_counts() -> None:
    assert chosen(code="factors") == ("factors", "keep", "keep")
    assert chosen(code="int8") == ("int8", "keep", "keep")
    assert chosen(code="int8", lm_head="compress") == ("int8", "keep", "compress")
    assert chosen(adapters=True, code="int4") == ("int4", "keep", "keep")
    assert chosen(embeddings="average") == ("int4", "average", "compress")
    assert chosen(method="published") == ("factors", "keep", "keep")


def test_the_plan_knows_adapters_over_one_model(tmp_path: Path) -> None:
    base = make_experts("llama", tmp_path, count=1)["e0"]
    tiny_tokenizer().save_pretrained(base)
    adapters = {n: str(write_adapter(tmp_path / n, base, seed=i, r=2)) for i, n in enumerate("ab")}
    sources: dict[str, Any] = {name: {"source": path, "base": str(base)} for name, path in adapters.items()}
    plan = plan_merge({"experts": sources})
    assert (plan.recipe.code, plan.recipe.embeddings) == ("factors", "keep")
    assert plan_merge({"experts": sources, "adapters": "average"}).recipe.code == "int4"
    bundle = merge({"experts": sources}, tmp_path / "bundle")
    assert bundle.code.peft_readable and bundle.manifest.method.lm_head == "keep"
    assert plan_merge({"experts": {**sources, "c": str(base)}}).recipe.code == "factors"  # the base itself, too


def test_a_manifest_holds_what_it_stood_for(tmp_path: Path) -> None:
    sources = {name: str(path) for name, path in make_experts("llama-tied", tmp_path).items()}
    bundle = merge({"experts": sources, "compress_rate": 0.5}, tmp_path / "bundle")
    method = bundle.manifest.method
    assert (method.code, method.embeddings, method.lm_head) == ("int4", "compress", "compress")


def test_auto_is_no_code_to_search_among(tmp_path: Path) -> None:
    sources = {name: str(path) for name, path in make_experts("llama", tmp_path).items()}
    with pytest.raises(RecipeError, match="no code 'auto'"):
        find({"experts": sources}, "size=1.5x", codes=["auto"])
