"""`align: permutation`: a shuffled expert merges as if it had not been, and no expert's function changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from polymerge import Bundle, add_expert, inspect_bundle, load_model, merge, plan_merge, verify
from polymerge.bundle.alignment import read_alignment
from polymerge.errors import SourceError
from polymerge.merging.align import axes_of_checkpoint, prove_orders, random_orders
from polymerge.sources.aligned import AlignedCheckpoint, moves_of
from polymerge.sources.checkpoint import Checkpoint
from polymerge.sources.opening import open_checkpoint
from tests.tiny import ARCHITECTURES, COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**COMMON, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
SMALL: dict[str, Any] = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "gpt2": GPT2Config(
        n_embd=16, n_layer=1, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "mixtral": MixtralConfig(**TINY, num_local_experts=2, num_experts_per_tok=1),
}
UP = "model.layers.0.mlp.up_proj.weight"


def shuffled(source: Path, target: Path) -> Checkpoint:
    """The expert in another order, as a folder of its own."""
    checkpoint = open_checkpoint(str(source))
    axes = axes_of_checkpoint(checkpoint)
    orders = random_orders(axes, torch.Generator().manual_seed(3))
    other = AlignedCheckpoint(checkpoint, moves_of(axes, orders))
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    save_file({n: other.read(n).contiguous() for n in other.tensors}, target / "model.safetensors", {"format": "pt"})
    return other


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(3, 12)[None]).logits


@pytest.mark.parametrize("architecture", SMALL)
def test_a_shuffled_expert_merges_as_if_it_had_not_been(architecture: str, tmp_path: Path) -> None:
    experts = make_experts(architecture, tmp_path, count=2, config=SMALL[architecture], spread=0.01)
    shuffled(experts["e1"], tmp_path / "shuffled")
    torch.testing.assert_close(logits(experts["e1"]), logits(tmp_path / "shuffled"), atol=1e-5, rtol=1e-4)
    recipe = {"compress_rate": 0.6}
    pairs = {"plain": experts["e1"], "aligned": tmp_path / "shuffled", "apart": tmp_path / "shuffled"}
    made: dict[str, Bundle] = {}
    for name, path in pairs.items():
        more = {"align": "permutation"} if name == "aligned" else {}
        made[name] = merge(
            {"experts": {"e0": str(experts["e0"]), "e1": str(path)}, "code": "factors", **recipe, **more},
            tmp_path / name,
        )
    plain, aligned, apart = (made[name] for name in pairs)
    assert verify(aligned, sources=True).problems == []
    for line, other in zip(plain.stats(), aligned.stats(), strict=True):
        for key in ("residual_norm", "relative_error", "energy_kept", "scale"):
            assert line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), line["tensor"]
    for tensor in plain.layers:
        torch.testing.assert_close(plain.base_tensor(tensor), aligned.base_tensor(tensor), atol=1e-6, rtol=1e-5)
    assert inspect_bundle(apart).experts[1].lost_by_averaging > 5 * inspect_bundle(plain).experts[1].lost_by_averaging
    before, after = inspect_bundle(aligned).experts[1].aligned or (0.0, 0.0)
    assert before > 5 * after > 0 and inspect_bundle(aligned).experts[0].aligned is None
    assert (
        inspect_bundle(plain).experts[1].aligned is None and "align" not in (plain.path / "polymerge.json").read_text()
    )


def test_at_rate_0_the_answers_are_the_shuffled_experts(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=2, config=SMALL["llama"])
    shuffled(experts["e1"], tmp_path / "s")
    sources = {"e0": str(experts["e0"]), "e1": str(tmp_path / "s")}
    bundle = merge(
        {"experts": sources, "code": "factors", "compress_rate": 0.0, "align": "permutation"}, tmp_path / "b"
    )
    model = load_model(bundle, device="cpu", dtype="float32")
    with torch.no_grad():
        got = model(torch.arange(3, 12)[None].expand(2, -1), experts=["e0", "e1"]).logits
    torch.testing.assert_close(got, torch.cat([logits(Path(p)) for p in sources.values()]), atol=1e-4, rtol=1e-4)


def test_an_expert_that_is_added_is_aligned_too(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=3, config=SMALL["llama"], spread=0.01)
    shuffled(experts["e2"], tmp_path / "s")
    first = {name: str(experts[name]) for name in ("e0", "e1")}
    wanted = {"experts": first, "code": "factors", "compress_rate": 0.6}
    plain = add_expert(merge(wanted, tmp_path / "p"), "e2", experts["e2"]).bundle
    added = add_expert(merge({**wanted, "align": "permutation"}, tmp_path / "b"), "e2", tmp_path / "s")
    bundle = added.bundle
    for name in bundle.experts[1:]:
        torch.testing.assert_close(bundle.reconstruct(name, UP), plain.reconstruct(name, UP), atol=1e-5, rtol=1e-4)
    assert verify(bundle, sources=True).problems == []
    before, after = inspect_bundle(bundle).experts[2].aligned or (0.0, 0.0)
    assert before > 5 * after


def test_verify_sees_orders_that_are_not_the_experts(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=2, config=SMALL["llama"])
    shuffled(experts["e1"], tmp_path / "s")
    sources = {"e0": str(experts["e0"]), "e1": str(tmp_path / "s")}
    bundle = merge(
        {"experts": sources, "code": "factors", "compress_rate": 0.6, "align": "permutation"}, tmp_path / "b"
    )
    file = bundle.path / "experts/e1/alignment.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp"

    def resigned(changed: dict[str, torch.Tensor]) -> list[str]:
        save_file(changed, file)
        manifest = json.loads((bundle.path / "polymerge.json").read_text())
        data = file.read_bytes()
        import hashlib

        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"]["experts/e1/alignment.safetensors"] = entry
        manifest["versions"].pop("manifest", None)  # its digest, which tells of any change
        (bundle.path / "polymerge.json").write_text(json.dumps(manifest))
        return verify(bundle.path, sources=True).problems

    assert "is no order" in resigned({**tensors, name: torch.zeros_like(tensors[name])})[0]
    assert UP in " ".join(resigned({**tensors, name: tensors[name].flip(0)}))
    heads = tensors["model.layers.0.self_attn"]
    assert "groups whole" in resigned({**tensors, "model.layers.0.self_attn": heads[[0, 2, 1, 3]]})[0]
    assert "has no order" in resigned({key: value for key, value in tensors.items() if key != name})[0]
    assert resigned(tensors) == []


def test_experts_that_fit_stay_as_they_are(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=2, config=SMALL["llama"])
    sources = {name: str(path) for name, path in experts.items()}
    bundle = merge({"experts": sources, "code": "factors", "align": "permutation"}, tmp_path / "b")
    plain = merge({"experts": sources, "code": "factors"}, tmp_path / "p")
    alignment = read_alignment(bundle.path, bundle.manifest, "e1")
    assert alignment and all(torch.equal(o, torch.arange(len(o))) for o in alignment.orders.values())
    assert alignment.before == alignment.after > 0
    file = "experts/e1/adapter_model.safetensors"
    assert (bundle.path / file).read_bytes() == (plain.path / file).read_bytes()
    assert any("aligned by permutation: 1 MLPs and 1 attentions" in note for note in bundle.manifest.notes)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_other_orders_leave_an_architecture_as_it_was(architecture: str, tmp_path: Path) -> None:
    [source] = make_experts(architecture, tmp_path, count=1).values()
    checkpoint = open_checkpoint(str(source))
    axes = axes_of_checkpoint(checkpoint)
    assert sum(bool(axis.groups) for axis in axes) == 2  # both layers' heads
    prove_orders(checkpoint)


def test_what_permutations_would_change_is_refused_before_a_tensor_is_read(tmp_path: Path) -> None:
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=96, hidden_size=16, n_layer=1, n_head=4)  # ALiBi: every head has its own slope
    experts = make_experts("bloom", tmp_path, count=2, config=config)
    recipe = {"experts": {n: str(p) for n, p in experts.items()}, "code": "factors", "align": "permutation"}
    with pytest.raises(SourceError, match="change the answers of a small BloomForCausalLM"):
        merge(recipe, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_without_an_axis_or_with_fused_experts_it_is_one_line_of_the_plan(tmp_path: Path) -> None:
    from transformers import GptOssConfig, MambaConfig

    mamba = MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)
    fused = GptOssConfig(**TINY, num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    for name, config, line in (("mamba", mamba, "no axis is known"), ("oss", fused, "fused mixture of experts")):
        experts = make_experts(name, tmp_path, count=2, config=config)
        with pytest.raises(SourceError, match=line):
            plan_merge({"experts": {n: str(p) for n, p in experts.items()}, "code": "factors", "align": "permutation"})
