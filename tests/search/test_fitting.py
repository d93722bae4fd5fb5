"""How many bytes a bundle takes, before it is made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymerge import load_recipe, merge, plan_merge
from polymerge.bundle.adapter import adapter_shapes
from polymerge.search.fitting import STEPS, Fitting
from tests.conftest import Merged
from tests.tiny import ARCHITECTURES, make_experts


def fitting_of(experts: dict[str, Path], **recipe: object) -> Fitting:
    return Fitting.of(
        plan_merge(load_recipe({"experts": {n: str(p) for n, p in experts.items()}, "code": "factors", **recipe}))
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recipe", [{"compress_rate": 0.8}, {"compress_rate": 0.7, "code": "int4", "norms": "average"},
                                    {"compress_rate": 0.0}, {"compress_rate": 1.0, "lm_head": "average"}])  # fmt: skip
def test_no_bundle_takes_more_than_is_said_and_little_less(
    merged: Merged, architecture: str, recipe: dict[str, object]
) -> None:
    bundle, experts = merged(architecture, **recipe)
    fitting = fitting_of(experts, **recipe)
    said, true = fitting.bytes(fitting.plan), bundle.sizes().total
    entries = sum(len(adapter_shapes(bundle, name)) for name in bundle.experts) + len(bundle.layers)
    assert true <= said <= true + 1000 * entries  # headers, which weigh much in tiny files


def test_what_experts_share_is_counted_once(tmp_path: Path) -> None:
    """Frozen embeddings and layers, as a LoRA of some modules leaves them: the plan alone counts them N times."""
    experts = make_experts("llama", tmp_path, count=3)
    first = load_file(experts["e0"] / "model.safetensors")
    for name in ("e1", "e2"):
        weights = load_file(experts[name] / "model.safetensors")
        frozen = {key: first[key] for key in weights if "q_proj" not in key}
        save_file(weights | frozen, experts[name] / "model.safetensors", metadata={"format": "pt"})
    fitting = fitting_of(experts, compress_rate=0.5)
    bundle = merge(fitting.plan.recipe, tmp_path / "bundle")
    assert bundle.sizes().total <= fitting.bytes(fitting.plan) < 1.5 * bundle.sizes().total < fitting.plan.write_bytes
    assert {name for name in first if name not in fitting.shared} == {
        f"model.layers.{number}.self_attn.q_proj.weight" for number in range(2)
    }


def test_a_difference_in_the_last_row_or_the_sign_of_zero_is_one(tmp_path: Path) -> None:
    path = make_experts("llama", tmp_path, count=1)["e0"]
    experts = {name: tmp_path / name for name in ("a", "b", "c")}
    for folder in experts.values():
        shutil.copytree(path, folder)
    changed = load_file(path / "model.safetensors")
    changed["lm_head.weight"][-1, -1] += 1
    changed["model.norm.weight"][0] = 0.0
    save_file(changed, experts["b"] / "model.safetensors", metadata={"format": "pt"})
    changed["model.norm.weight"][0] = -0.0
    save_file(changed, experts["c"] / "model.safetensors", metadata={"format": "pt"})
    fitting = fitting_of(experts)
    assert set(changed) - fitting.shared == {"lm_head.weight", "model.norm.weight"}


@pytest.mark.parametrize("code", ["factors", "int8", "int4"])
def test_the_lowest_rate_that_fits_is_found(tmp_path: Path, code: str) -> None:
    fitting = fitting_of(make_experts("llama", tmp_path, dtype=torch.bfloat16))
    sizes = {keep: fitting.bytes(fitting.at(keep, code)) for keep in (0, 300, 2000, 9000, STEPS)}  # type: ignore[arg-type]
    for keep, size in sizes.items():
        most = fitting.most(size, code)  # type: ignore[arg-type]
        assert most is not None and most >= keep
        assert fitting.bytes(fitting.at(most, code)) <= size  # type: ignore[arg-type]
        if most < STEPS:
            assert fitting.bytes(fitting.at(most + 1, code)) > size  # type: ignore[arg-type]
    assert fitting.most(sizes[0] - 1, code) is None  # type: ignore[arg-type]
    assert fitting.most(10 * sizes[STEPS], code) == STEPS  # type: ignore[arg-type]


@pytest.mark.parametrize("code", ["factors", "int4"])
def test_all_is_whole_beyond_the_most_compressed(tmp_path: Path, code: str) -> None:
    fitting = fitting_of(make_experts("llama", tmp_path, count=2))
    most = fitting.most_compressed(code)  # type: ignore[arg-type]
    for keep, whole in ((most, False), (most + 1, True)):
        linear = [t for t in fitting.at(keep, code).tasks if t.record.role == "linear"]  # type: ignore[arg-type]
        assert all(task.treatment == "full" for task in linear) == whole
