"""Matrices of one row, and numbers near the end of what a dtype holds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymerge import add_expert, merge
from polymerge.errors import SourceError
from polymerge.merging.treatment import treatment_of
from polymerge.recipe.merge import Recipe
from polymerge.sources.layers import LayerRecord
from tests.tiny import make_experts

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("rate", "expected"), [(0.0, "full"), (0.5, "full"), (0.95, "full"), (1.0, "average")])
@pytest.mark.parametrize("shape", [(1, 48), (48, 1), (1, 1)])
def test_a_matrix_too_small_for_factors_is_whole_but_averaged_at_rate_one(
    shape: tuple[int, int], rate: float, expected: str
) -> None:
    """As a mixture's gate of one row."""
    record = LayerRecord("gate.weight", "gate", "weight", "linear", False)
    for code in ("factors", "int4"):
        recipe = Recipe.model_validate({"experts": {"a": "x", "b": "y"}, "compress_rate": rate, "code": code})
        assert treatment_of(record, shape, recipe) == (expected, 0)


def change(path: Path, **weights: float) -> None:
    tensors = load_file(path / "model.safetensors")
    for name, value in weights.items():
        tensors[name] = torch.zeros_like(tensors[name])
        tensors[name].view(-1)[:2] = torch.tensor([value, value / 4])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_an_average_that_is_larger_than_every_expert_is_one_line(tmp_path: Path, rate: float) -> None:
    """e0 is one number, e1 a thousand times as large: their mean direction at their mean norm leaves float16."""
    experts = make_experts("llama", tmp_path, count=2)
    change(experts["e0"], **{Q0: 1e2})
    tensors = load_file(experts["e1"] / "model.safetensors")
    tensors[Q0] = torch.full_like(tensors[Q0], 6e4)
    save_file(tensors, experts["e1"] / "model.safetensors", {"format": "pt"})
    recipe = {
        "experts": {n: str(p) for n, p in experts.items()},
        "code": "factors",
        "compress_rate": rate,
        "dtype": "float16",
    }
    with pytest.raises(SourceError, match=rf"'{Q0}': the experts' average is too large for float16; say a wider"):
        merge(recipe, tmp_path / "out")
    assert merge({**recipe, "dtype": "float32"}, tmp_path / "out").experts == ["e0", "e1"]


def test_a_residual_whose_factors_leave_the_dtype_is_one_line(tmp_path: Path) -> None:
    """Every number fits into float16; the singular values of what is added do not."""
    experts = make_experts("llama", tmp_path)
    recipe = {
        "experts": {n: str(experts[n]) for n in ("e0", "e1")},
        "code": "factors",
        "compress_rate": 0.5,
        "dtype": "float16",
    }
    bundle = merge(recipe, tmp_path / "out")
    tensors = load_file(experts["e2"] / "model.safetensors")
    tensors[Q0] = torch.full_like(tensors[Q0], 3e4)
    save_file(tensors, experts["e2"] / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=rf"'{Q0}': the residual of expert 'e2' is too large for float16"):
        add_expert(bundle, "e2", experts["e2"])


def test_numbers_near_float32s_largest_have_no_finite_sum(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=2)
    for path in experts.values():
        change(path, **{"model.norm.weight": 3e38})
    change(experts["e1"], **{"model.norm.weight": 3.1e38})
    with pytest.raises(SourceError, match=r"'model\.norm\.weight': the experts' average is too large for float32"):
        merge({"experts": {n: str(p) for n, p in experts.items()}, "code": "factors"}, tmp_path / "out")
