"""A bundle whose residuals have a code is whole: it says the same everywhere, grows, resumes and refuses damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from polymerge import Bundle, add_expert, export_dense, export_peft, load_model, merge, remove_expert, verify
from polymerge.bundle import tensors
from polymerge.bundle.inspect import inspect_bundle
from polymerge.bundle.manifest import ADAPTER_FILE
from polymerge.errors import BundleError, PolymergeError
from polymerge.merging.plan import plan_merge
from polymerge.method.code import Code
from polymerge.recipe.merge import load_recipe
from polymerge.sources.opening import open_checkpoint
from tests.conftest import Merged
from tests.merging.test_kill import content

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
CODED = ["int8", "int4"]


@pytest.mark.parametrize(
    ("architecture", "code"), [("llama-tied", "int8"), ("gpt2", "int4"), ("qwen2", "int4"), ("mixtral", "int4")]
)
def test_a_coded_bundle_is_whole_and_says_the_same_everywhere(
    merged: Merged, tmp_path: Path, architecture: str, code: str
) -> None:
    bundle, _ = merged(architecture, compress_rate=0.7, code=code, scale="shared")
    assert verify(bundle, sources=True).problems == []
    expected = load_model(bundle)(IDS, experts="e1").logits
    dense = AutoModelForCausalLM.from_pretrained(export_dense(bundle, "e1", tmp_path / "dense"))
    base = AutoModelForCausalLM.from_pretrained(bundle.path)
    adapted = PeftModel.from_pretrained(base, export_peft(bundle, "e1", tmp_path / "peft").folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(adapted(IDS).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("code", CODED)
def test_the_same_rate_keeps_more_in_fewer_bytes(merged: Merged, code: str) -> None:
    published, coded = (inspect_bundle(merged("llama", compress_rate=0.7, code=c)[0]) for c in ("factors", code))
    for one, other in zip(published.experts, coded.experts, strict=True):
        assert other.residual_bytes <= one.residual_bytes / 2  # the bundle is in float32, the budget is of 16 bits
        assert other.relative_error < one.relative_error
    assert (published.code, coded.code) == ("factors", code)


def test_a_plan_says_the_bytes_that_a_coded_bundle_has(merged: Merged) -> None:
    bundle, experts = merged("llama", compress_rate=0.7, code="int4")
    sources = {name: str(path) for name, path in experts.items()}
    plan = plan_merge(load_recipe({"experts": sources, "compress_rate": 0.7, "code": "int4"}))
    assert plan.residual_bytes == inspect_bundle(bundle).experts[0].residual_bytes


def test_rate_0_is_exact_with_any_code(merged: Merged) -> None:
    bundle, _ = merged("llama", compress_rate=0, code="int4")
    checks = verify(bundle, sources=True).sources
    assert all(check.exact == check.tensors for check in checks)


def test_readers_of_adapters_refuse_a_coded_expert_and_say_what_to_do(merged: Merged) -> None:
    bundle, _ = merged("llama", compress_rate=0.7, code="int4")
    folder = bundle.expert_folder("e0")
    assert not list(folder.glob("adapter_model*"))
    base = AutoModelForCausalLM.from_pretrained(bundle.path)
    with pytest.raises(KeyError, match="polymerge export --to peft"):
        PeftModel.from_pretrained(base, folder)
    with pytest.raises(PolymergeError, match="polymerge export --to peft"):
        open_checkpoint(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert not {"r", "lora_alpha", "target_modules"} & set(settings)  # vLLM asks for these, whatever the type


def test_growing_keeps_the_code(merged: Merged, tmp_path: Path) -> None:
    bundle, experts = merged("llama", compress_rate=0.7, code="int4")
    path = Path(shutil.copytree(bundle.path, tmp_path / "b"))
    added = add_expert(path, "more", str(experts["e0"]))
    assert (added.bundle.expert_folder("more") / Code.file_name).is_file()
    # e0 is in the average already: added again it is compressed from the same residual
    assert added.bundle.reconstruct("more", "lm_head.weight").equal(bundle.reconstruct("e0", "lm_head.weight"))
    left = remove_expert(remove_expert(added.bundle, "e0"), "e1")
    assert verify(left, sources=True).problems == []
    assert left.experts == ["e2", "more"]


def test_a_merge_that_was_stopped_gives_the_same_bytes(merged: Merged, tmp_path: Path) -> None:
    bundle, experts = merged("llama", compress_rate=0.7, code="int4")
    recipe = {
        "experts": {name: str(path) for name, path in experts.items()},
        "compress_rate": 0.7,
        "code": "int4",
        "workers": 2,
    }

    class Stop(Exception):
        pass

    def stop(progress: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        merge(recipe, tmp_path / "b", progress=stop)
    resumed = merge(recipe, tmp_path / "b", resume=True)
    assert content(resumed.path) == content(bundle.path)


def test_the_default_is_the_published_code_in_the_format_of_before(merged: Merged, tmp_path: Path) -> None:
    bundle, _ = merged("llama", compress_rate=0.7)
    text = json.loads((bundle.path / "polymerge.json").read_text())
    assert text["format_version"] == 1 and "code" not in text["method"]
    assert (bundle.expert_folder("e0") / ADAPTER_FILE).is_file()
    coded, _ = merged("llama", compress_rate=0.7, code="int4")
    text = json.loads((coded.path / "polymerge.json").read_text())
    assert text["format_version"] == 2 and text["method"]["code"] == "int4"
    path = Path(shutil.copytree(coded.path, tmp_path / "b"))
    (path / "polymerge.json").write_text(json.dumps(text | {"format_version": 1}))
    with pytest.raises(BundleError, match="does not fit code 'int4'"):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("key", "damage", "said"),
    [
        ("lora_A.int4", "lost", "has lora_A.int4_scale but no lora_A.int4"),
        ("lora_B.int4_scale", "lost", "has lora_A.int4 but no lora_B.int4_scale"),
        ("lora_A.int4", "cut", "lora_A.int4 is uint8"),
        ("lora_B.int4_scale", "nan", "NaN"),
    ],
)
def test_a_damaged_code_is_a_problem_and_not_loaded(
    merged: Merged, tmp_path: Path, key: str, damage: str, said: str
) -> None:
    coded, _ = merged("llama", compress_rate=0.7, code="int4")
    path = Path(shutil.copytree(coded.path, tmp_path / "b"))
    file = path / "experts" / "e0" / Code.file_name
    tensors = load_file(file)
    name = f"base_model.model.model.layers.0.mlp.up_proj.{key}"
    if damage == "lost":
        del tensors[name]
    elif damage == "cut":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors[name][0] = float("nan")
    save_file(tensors, file)
    manifest = json.loads((path / "polymerge.json").read_text())
    entry = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest["files"][f"experts/e0/{Code.file_name}"] = entry
    (path / "polymerge.json").write_text(json.dumps(manifest))
    assert [problem for problem in verify(path).problems if said in problem and "up_proj" in problem]
    if damage != "nan":
        with pytest.raises(BundleError, match=said):
            load_model(path)


def test_a_residual_is_read_with_one_opening_of_its_file(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = merged("llama", compress_rate=0.7, code="int4")
    expert, openings = bundle.experts[0], []
    reader = bundle.expert_reader(expert)
    real = tensors.opened
    monkeypatch.setattr(tensors, "opened", lambda file: openings.append(file) or real(file))
    layer = next(layer for layer in bundle.layers.values() if layer.rank)
    assert reader.factors(layer.tensor) is not None
    assert openings == [bundle.expert_file(expert)]
