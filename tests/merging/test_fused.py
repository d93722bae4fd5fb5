"""Mixtures of experts whose matrices are stored in one tensor: every matrix has its own average, ratio and factors.

Oracles: transformers' own models of the originals and of dense exports, and `torch.linalg.svd` matrix by matrix.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from polymerge import Bundle, add_expert, export_dense, export_peft, export_vllm, merge, remove_expert, verify
from polymerge.bundle.inspect import inspect_bundle
from polymerge.bundle.manifest import Manifest
from polymerge.errors import BundleError, ModelError
from polymerge.method.rsvd import rank_for_rate
from tests.sweep.check import check
from tests.sweep.experts import make_experts

pytestmark = pytest.mark.usefixtures("one_thread")

# The layouts there are, with an architecture each.
FUSED = {
    "gpt_oss": "[E, in, out], gate and up interleaved, with biases",
    "llama4_text": "[E, in, out], all block experts at once",
    "granitemoe": "[E, out, in], under another name than the parameter's",
    "jetmoe": "[E, out, in], in the attention too",
    "aria_text": "[E, in, out], under another name than the parameter's",
    "dbrx": "[E out, in]: two dimensions",
    "mixtral": "stored one by one",
    "qwen3_moe": "stored one by one",
}
QUICK = ("gpt_oss", "dbrx")


@pytest.mark.parametrize(
    "architecture", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FUSED]
)
def test_every_row_has_its_own_experts_answer_and_the_bundle_is_small(architecture: str) -> None:
    """Rate 0 against the originals; 0.95 and int4 against the dense export; generation, reload."""
    outcome = check(architecture, variants=("0.95",) if architecture in QUICK else ("0", "0.95", "int4"))
    assert outcome.status == "works", f"{outcome.step}: {outcome.detail}"
    assert 0 < outcome.worst < 1e-4
    assert outcome.share is not None
    assert 1 < outcome.share <= 1.4  # 64 wide, so that headers and norms count; test_fused_sizes.py has real shapes


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three experts."""
    return make_experts("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


def merged(experts: dict[str, Path], folder: Path, **settings: object) -> Bundle:
    sources = {name: str(path) for name, path in experts.items()}
    return merge(
        {"experts": sources, "code": "factors", "compress_rate": 0.5, "embeddings": "average", **settings}, folder
    )


def matrices(tensor: Tensor, count: int = 4) -> Tensor:
    """[E, m, n], float64."""
    return tensor.double().reshape(count, -1, tensor.shape[-1])


@pytest.mark.parametrize(
    ("architecture", "tensor"), [("gpt_oss", "mlp.experts.gate_up_proj"), ("dbrx", "ffn.experts.mlp.w2")]
)
def test_every_matrix_is_compressed_as_a_linear_weight_is(architecture: str, tensor: str, tmp_path: Path) -> None:
    experts = make_experts(architecture, tmp_path, count=2)
    bundle = merged(experts, tmp_path / "bundle")
    originals = {name: load_file(path / "model.safetensors") for name, path in experts.items()}
    base = load_file(tmp_path / "bundle" / "model.safetensors")
    name = next(name for name in originals["e0"] if name.endswith(tensor))
    assert base[name].shape == originals["e0"][name].shape, "the average is an ordinary checkpoint"
    stacks = {expert: matrices(tensors[name]) for expert, tensors in originals.items()}
    norms = {expert: torch.linalg.matrix_norm(stack) for expert, stack in stacks.items()}  # [E]
    mean = sum(norms.values()) / 2
    average = sum(stacks[e] / norms[e][:, None, None] for e in stacks) / 2 * mean[:, None, None]
    torch.testing.assert_close(matrices(base[name]), average, rtol=1e-5, atol=1e-6)
    lines = {(line["tensor"], line["expert"]): line for line in bundle.stats()}
    rank = rank_for_rate(*average.shape[1:], 0.5)
    for expert, stack in stacks.items():
        for index in range(4):
            part = f"{name}.{index}"
            line = lines[part, expert]
            ratio = bundle.scales(expert)[part]
            assert ratio == pytest.approx(float(norms[expert][index] / mean[index]))
            residual = stack[index] - ratio * matrices(base[name])[index]
            best = float(torch.linalg.svdvals(residual)[rank:].norm())
            lost = float((stack[index] - bundle.reconstruct(expert, part).double()).norm())
            assert best <= lost <= 1.02 * best
            assert line["relative_error"] == pytest.approx(lost / float(norms[expert][index]), rel=1e-3)
            assert (line["rank"], line["storage"]) == (rank, "low_rank")


def test_a_fused_source_and_one_that_is_stored_one_by_one_are_the_same(tmp_path: Path) -> None:
    experts = make_experts("mixtral", tmp_path, count=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(experts["e1"])
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    with safe_open(tmp_path / "fused" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.gate_up_proj" in set(file.keys())
    usual = merged(experts, tmp_path / "usual")
    mixed = merged(experts | {"e1": tmp_path / "fused"}, tmp_path / "mixed")
    assert mixed.manifest.files == usual.manifest.files
    assert not any(layer.slice for layer in mixed.manifest.layers)
    assert verify(mixed, sources=True).ok


def test_an_expert_comes_goes_and_is_held_against_its_source(gpt_oss: dict[str, Path], tmp_path: Path) -> None:
    bundle = merged({name: gpt_oss[name] for name in ("e0", "e1")}, tmp_path / "bundle")
    base = (tmp_path / "bundle" / "model.safetensors").read_bytes()
    added = add_expert(bundle, "e2", gpt_oss["e2"])
    assert 0 < added.fresh_relative_error <= added.relative_error < 0.5
    assert verify(added.bundle, sources=True).problems == []
    summary = inspect_bundle(added.bundle)
    assert summary.storage == {"low_rank": 2 * (4 + 2 * 4)}  # of two layers: attention, and two matrices a block expert
    assert {"experts.gate_up_proj", "experts.down_proj"} <= summary.energy_by_kind.keys()
    assert {"model.layers.0.mlp.experts.gate_up_proj.3"} <= {line["tensor"] for line in added.bundle.stats()}
    swapped = verify(added.bundle, source={"e2": str(gpt_oss["e1"])})
    assert any("gate_up_proj.0" in problem for problem in swapped.problems)
    rest = remove_expert(added.bundle, "e1")
    assert rest.experts == ["e0", "e2"]
    assert verify(rest, sources=True).ok
    assert (tmp_path / "bundle" / "model.safetensors").read_bytes() == base


def test_at_rate_0_every_expert_comes_back_to_the_bit(gpt_oss: dict[str, Path], tmp_path: Path) -> None:
    bundle = merged(gpt_oss, tmp_path / "bundle", compress_rate=0.0, embeddings="keep")
    for name, source in gpt_oss.items():
        export_dense(bundle, name, tmp_path / name)
        one, other = load_file(source / "model.safetensors"), load_file(tmp_path / name / "model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)


def test_where_all_agree_a_matrix_is_stored_once(gpt_oss: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name, folder = "model.layers.0.mlp.experts.down_proj", tmp_path / "e1"
    tensors = load_file(gpt_oss["e1"] / "model.safetensors")
    tensors[name][2] = load_file(gpt_oss["e0"] / "model.safetensors")[name][2]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((gpt_oss["e1"] / "config.json").read_bytes())
    bundle = merged({"e0": gpt_oss["e0"], "e1": folder}, tmp_path / "bundle")
    storage = {line["tensor"]: line["storage"] for line in bundle.stats() if line["tensor"].startswith(name)}
    assert storage == {f"{name}.{n}": "average" if n == 2 else "low_rank" for n in range(4)}
    assert torch.equal(bundle.reconstruct("e1", f"{name}.2"), tensors[name][2])


@pytest.fixture
def small(gpt_oss: dict[str, Path], tmp_path: Path) -> Bundle:
    return merged({name: gpt_oss[name] for name in ("e0", "e1")}, tmp_path / "small")


def test_the_version_is_one_that_older_readers_do_not_know(small: Bundle) -> None:
    assert small.manifest.format_version >= 4
    with pytest.raises(ValueError, match="format version 3 does not fit"):
        Manifest.model_validate(json.loads(small.manifest.to_json()) | {"format_version": 3})


@pytest.mark.parametrize("lie", ["missing", "count", "shape", "name"])
def test_a_manifest_that_contradicts_itself_is_refused(small: Bundle, lie: str) -> None:
    data = json.loads(small.manifest.to_json())
    number = next(n for n, layer in enumerate(data["layers"]) if layer.get("slice"))
    layer = data["layers"][number]
    if lie == "missing":
        del data["layers"][number]
    elif lie == "count":
        layer["slice"]["count"] = 3
    elif lie == "shape":
        layer["slice"]["shape"] = [4, 64, 64]
    else:
        layer["tensor"] = "model.norm.weight"
    with pytest.raises(ValueError, match="matri"):
        Manifest.model_validate(data)


def test_a_base_that_is_not_the_manifests_is_refused(small: Bundle) -> None:
    from safetensors.torch import save_file

    file = small.path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})
    damaged = Bundle(small.path, small.manifest)
    with pytest.raises(BundleError, match="down_proj"):
        damaged.base_tensor(f"{name}.0")


def test_what_cannot_be_exported_is_refused_by_name(small: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gate_up_proj|down_proj"):
        export_peft(small, "e0", tmp_path / "peft")
    with pytest.raises(ModelError, match="mixture-of-experts"):
        export_vllm(small, tmp_path / "vllm")
    assert not (tmp_path / "peft").exists()
    peft = pytest.importorskip("peft")
    average = transformers.AutoModelForCausalLM.from_pretrained(small.path)
    with pytest.raises((KeyError, ValueError), match="POLYMERGE_SLICED_BLOCKS"):
        peft.PeftModel.from_pretrained(average, small.expert_folder("e0"))
