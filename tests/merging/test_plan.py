"""What a merge will do and how many bytes: against arithmetic by hand, and against bundles that are really there."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from polymerge import load_recipe, merge, plan_merge
from polymerge.errors import SourceError
from polymerge.merging.plan import MergePlan, replanned
from polymerge.sources.opening import open_checkpoint
from tests.conftest import Merged
from tests.test_paths import STRANGE
from tests.tiny import ARCHITECTURES, make_experts

ROOT = Path(__file__).parents[2]


def planned(experts: dict[str, Path], **recipe: Any) -> MergePlan:
    return plan_merge(
        load_recipe({"experts": {name: str(path) for name, path in experts.items()}, "code": "factors", **recipe})
    )


def test_the_sizes_of_a_tiny_llama_by_hand(checkpoints: Any) -> None:
    """Width 48, 80 inside, 4 heads of 12 with 2 of keys, 2 layers, 96 words; three experts at rate 0.5 in float32."""
    plan = planned(checkpoints("llama"), compress_rate=0.5)
    square, narrow, wide = (48, 48), (24, 48), (80, 48)
    matrices = 2 * [square, narrow, narrow, square, wide, wide, wide]
    linear = sum(rows * columns for rows, columns in matrices)
    whole = 2 * 96 * 48 + 5 * 48  # embedding and head, two norms a layer and the last
    ranks = [rows * columns // (2 * (rows + columns)) for rows, columns in matrices]
    assert sorted(t.rank for t in plan.tasks if t.treatment == "low_rank") == sorted(ranks)
    assert plan.base_bytes == 4 * (linear + whole)
    assert plan.residual_bytes == 4 * sum(r * sum(shape) for r, shape in zip(ranks, matrices, strict=True))
    assert plan.own_bytes == 4 * whole
    assert plan.write_bytes == plan.base_bytes + 3 * (plan.residual_bytes + plan.own_bytes)
    assert plan.read_bytes == 2 * 3 * plan.base_bytes
    assert plan.memory_bytes >= 3 * 4 * 80 * 48
    summary = plan.summary()
    assert summary["ranks"] == [min(ranks), max(ranks)] and summary["compressed_tensors"] == len(matrices)
    assert summary["separate_models_bytes"] == 3 * plan.base_bytes and summary["tensors"] == len(plan.tasks)
    json.dumps(summary)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_width_is_half_the_bytes(checkpoints: Any, dtype: str) -> None:
    wide, narrow = (planned(checkpoints("llama"), compress_rate=0.5, dtype=name) for name in ("float32", dtype))
    assert narrow.write_bytes * 2 == wide.write_bytes
    assert narrow.read_bytes == wide.read_bytes  # the sources are what they are


def test_averaged_tensors_cost_an_expert_nothing(checkpoints: Any) -> None:
    plan = planned(checkpoints("llama"), embeddings="average", lm_head="average", norms="average")
    assert plan.own_bytes == 0


def test_more_workers_need_more_memory(checkpoints: Any) -> None:
    one, four = (planned(checkpoints("llama"), workers=workers) for workers in (1, 4))
    assert four.memory_bytes > one.memory_bytes and four.write_bytes == one.write_bytes


@pytest.mark.parametrize("code", ["factors", "int8", "int4"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.95, 1.0])
def test_another_rate_and_code_is_the_plan_that_would_be_made_anew(checkpoints: Any, rate: float, code: str) -> None:
    first = planned(checkpoints("qwen2"), compress_rate=0.7)
    again = replanned(first, compress_rate=rate, code=code)  # type: ignore[arg-type]
    anew = planned(checkpoints("qwen2"), compress_rate=rate, code=code)
    assert again.tasks == anew.tasks and again.recipe == anew.recipe
    assert again.write_bytes == anew.write_bytes


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_order_of_tensors_is_the_files(checkpoints: Any, architecture: str) -> None:
    experts = checkpoints(architecture)
    with safe_open(experts["e0"] / "model.safetensors", framework="pt") as handle:
        stored = set(handle.keys())
    plan = planned(experts)
    assert {task.name for task in plan.tasks} == stored and len(plan.tasks) == len(stored)
    assert [task.name for task in plan.tasks] == list(plan.first.tensors)
    assert all(task.sources == dict.fromkeys(experts, task.name) for task in plan.tasks)


@pytest.mark.parametrize(("tied", "module"), [(True, "model.embed_tokens"), (False, None)])
def test_a_tied_head_is_the_embeddings(checkpoints: Any, tied: bool, module: str | None) -> None:
    plan = planned(checkpoints("llama-tied" if tied else "llama"))
    assert plan.tied is tied and plan.tied_embedding == module


def test_biases_beside_compressed_weights_are_differences(checkpoints: Any) -> None:
    tasks = planned(checkpoints("qwen2"), compress_rate=0.5).tasks
    assert {task.record.role for task in tasks if task.as_difference} == {"bias"}
    assert sum(task.as_difference for task in tasks) == 6
    whole = planned(checkpoints("qwen2"), compress_rate=0.0).tasks
    assert not any(task.as_difference for task in whole)


def test_without_a_dtype_in_the_recipe_the_experts_must_have_one(checkpoints: Any, tmp_path: Path) -> None:
    narrow = make_experts("llama", tmp_path, count=1, dtype=torch.bfloat16)["e0"]
    experts = {"wide": checkpoints("llama")["e0"], "narrow": narrow}
    with pytest.raises(SourceError, match=r"wide: float32, narrow: bfloat16.*`dtype:`"):
        planned(experts)
    assert planned(experts, dtype="bfloat16").dtype == torch.bfloat16
    assert planned({"a": narrow, "b": narrow}).dtype == torch.bfloat16


def test_plan_says_what_the_merge_writes(checkpoints, tmp_path: Path) -> None:
    recipe = {
        "experts": {name: str(path) for name, path in checkpoints("llama").items()},
        "code": "factors",
        "compress_rate": 0.5,
    }
    planned = plan_merge(load_recipe(recipe)).write_bytes
    written = merge(recipe, tmp_path / "b").sizes().total
    headers = 40_000  # safetensors headers and scales, which a plan leaves out
    assert planned <= written <= planned + headers


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_a_plan_from_the_configuration_is_that_of_the_weights(
    architecture: str, merged: Merged, tmp_path: Path
) -> None:
    _, experts = merged(architecture)
    shutil.copy(experts["e0"] / "config.json", tmp_path)
    real = plan_merge(load_recipe({"experts": {name: str(path) for name, path in experts.items()}, "code": "factors"}))
    away = {"experts": {name: f"someone/{name}" for name in experts}, "code": "factors", "config": str(tmp_path)}
    plan = plan_merge(load_recipe(away), weights=False)
    assert plan.write_bytes == real.write_bytes
    assert [(t.name, t.rank, t.treatment) for t in plan.tasks] == [(t.name, t.rank, t.treatment) for t in real.tasks]
    assert any("no weight was looked at" in note for note in plan.notes)


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
    plan = plan_merge(load_recipe(written | {"config": str(tmp_path / "config")}), weights=False)
    names = dict(zip(written["experts"], map(str, experts.values()), strict=True))
    merge(written | {"experts": names, "code": "factors"}, tmp_path / "bundle")
    files = sum(file.stat().st_size for file in (tmp_path / "bundle").rglob("*") if file.is_file())
    assert plan.write_bytes == pytest.approx(files, rel=0.02)


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
    plan = plan_merge(load_recipe(written | {"config": str(config)}), weights=False)
    experts = {name: str(tmp_path / f"e{number}") for number, name in enumerate(written["experts"])}
    merge(written | {"experts": experts, "code": "factors"}, tmp_path / "bundle")
    files = sum(file.stat().st_size for file in (tmp_path / "bundle").rglob("*") if file.is_file())
    print(f"planned {plan.write_bytes}, written {files}", file=sys.stderr)
    assert plan.write_bytes == pytest.approx(files, rel=0.02)


def test_what_is_not_on_this_machine_is_found_out_before_anything_is_opened(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = checkpoints("llama")
    opened: list[str] = []

    def opening(source: Any) -> Any:
        opened.append(source.source)
        return open_checkpoint(source)

    monkeypatch.setattr("polymerge.merging.plan.open_source", opening)
    with pytest.raises(SourceError, match=r"expert 'away': ./nowhere: no such folder or file"):
        plan_merge({**{name: str(path) for name, path in experts.items()}, "away": "./nowhere"})
    assert opened == ["./nowhere"]
    opened.clear()
    assert list(plan_merge({name: str(path) for name, path in experts.items()}).recipe.experts) == list(experts)
    assert opened == [str(path) for path in experts.values()]


@pytest.mark.parametrize("source", STRANGE)
def test_a_source_that_is_no_path_is_named_in_one_line(source: str, checkpoints: Any) -> None:
    with pytest.raises(SourceError, match=r"\Aexpert 'a': .*no such folder or file, and not a hub id"):
        plan_merge({"a": source, "b": checkpoints("llama")["e0"]})


def test_so_it_is_in_a_recipes_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"experts:\n  a: ~nobodyhere/model\n  b: {'x' * 300}\nconfig: ~nobodyhere/c\n")
    with pytest.raises(SourceError, match=r"r.yaml, line 2: expert 'a': .*: no such folder or file, and not a hub id"):
        plan_merge(tmp_path / "r.yaml")


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_in_memory_is_told_what_a_plan_takes(inside: bool, checkpoints: Any) -> None:
    paths = checkpoints("llama")
    experts = {"a": transformers.AutoModelForCausalLM.from_pretrained(paths["e0"]), "b": str(paths["e1"])}
    with pytest.raises(SourceError, match=r"expert 'a': a model in memory, which `merge` alone takes; save it with"):
        plan_merge({"experts": experts} if inside else experts)  # type: ignore[dict-item]


@pytest.mark.parametrize("count", [2, 3])
def test_a_residual_of_two_experts_is_written_once_and_a_plan_says_so(count: int, tmp_path: Path) -> None:
    experts = {name: str(path) for name, path in make_experts("llama", tmp_path, count=count).items()}
    planned = plan_merge({"experts": experts, "code": "factors", "compress_rate": 0.5})
    written = sum(
        tensor.nbytes
        for file in merge(planned.recipe, tmp_path / "bundle").path.rglob("adapter_model.safetensors")
        for name, tensor in load_file(file).items()
        if "lora_" in name
    )
    said = count * planned.residual_bytes
    assert written == said - planned.shared_bytes and (planned.shared_bytes > 0) == (count == 2)


def test_a_bundle_for_an_expert_is_told_to_be_its_average(merged: Merged, tmp_path: Path) -> None:
    bundle, experts = merged("llama")
    said = f"expert 'b' is the average of the bundle {bundle.path}; for one of its experts: polymerge export"
    assert any(note.startswith(said) for note in plan_merge({"a": str(experts["e0"]), "b": str(bundle.path)}).notes)
    assert not [note for note in plan_merge({n: str(p) for n, p in experts.items()}).notes if "the average of" in note]
