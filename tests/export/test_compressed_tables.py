"""Residuals of embeddings and heads in exports: PEFT's own forward, and adapters added as vLLM adds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from polymerge import export_dense, export_peft, load_model, merge
from polymerge.errors import ModelError
from polymerge.export import plan_vllm, write_vllm
from polymerge.export.vllm.calibrate import applied, read_adapter
from polymerge.export.vllm.prompts import CalibrationPrompt
from polymerge.merging import run
from polymerge.merging.proof import Proof
from tests.tiny import VOCAB, make_experts, tiny_tokenizer
from tests.vocabularies import ADDED, PADDED, WIDE, kin

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Model has `tie_word")]
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
COMPRESS = {"embeddings": "compress", "lm_head": "compress", "embedding_rate": 0.6, "compress_rate": 0.6}


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "layers"))


def merged(architecture: str, folder: Path, **recipe: Any) -> Any:
    experts = make_experts(architecture, folder, count=2)
    tiny_tokenizer().save_pretrained(experts["e0"])
    return merge(
        {"experts": {n: str(p) for n, p in experts.items()}, "code": "factors", **COMPRESS, **recipe}, folder / "bundle"
    )


@pytest.mark.parametrize(("architecture", "code"), [("llama", "factors"), ("llama-tied", "int4"), ("gemma3", "int4")])
@torch.no_grad()
def test_peft_says_the_same(architecture: str, code: str, tmp_path: Path) -> None:
    bundle = merged(architecture, tmp_path, code=code, scale="shared", norms="average")
    written = export_peft(bundle, "e1", tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(bundle.path, dtype=torch.float32)
    average = base(IDS).logits
    got = PeftModel.from_pretrained(base, written.folder).eval()(IDS).logits
    expected = load_model(bundle)(IDS, experts="e1").logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    dense = AutoModelForCausalLM.from_pretrained(export_dense(bundle, "e1", tmp_path / "dense"), dtype=torch.float32)
    torch.testing.assert_close(dense.eval()(IDS).logits, expected, atol=1e-5, rtol=0)
    assert float((average - expected).abs().max()) > 1e-2


def test_a_head_alone_is_a_peft_adapter_as_it_lies(tmp_path: Path) -> None:
    bundle = merged("llama", tmp_path, embeddings="average", scale="shared")
    base = AutoModelForCausalLM.from_pretrained(bundle.path, dtype=torch.float32)
    with torch.no_grad():
        got = PeftModel.from_pretrained(base, bundle.expert_folder("e0")).eval()(IDS).logits
        torch.testing.assert_close(got, load_model(bundle)(IDS, experts="e0").logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
@torch.no_grad()
def test_beside_biases_an_embedding_leaves_whole(architecture: str, tmp_path: Path) -> None:
    """PEFT's factors of an embedding take no bias, and one bias in an adapter means one beside all factors."""
    bundle = merged(architecture, tmp_path, scale="shared", code="int4")
    base = AutoModelForCausalLM.from_pretrained(bundle.path, dtype=torch.float32)
    out = export_peft(bundle, "e1", tmp_path / "peft").folder
    got = PeftModel.from_pretrained(base, out).eval()(IDS).logits
    torch.testing.assert_close(got, load_model(bundle)(IDS, experts="e1").logits, atol=1e-5, rtol=0)


def test_what_peft_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    originals = kin(tmp_path / "kin", "untied", [WIDE, PADDED], [ADDED, ("<|end|>",)])
    experts = {name: str(original.path) for name, original in zip(("one", "two"), originals, strict=True)}
    own = merge({"experts": experts, "code": "factors", **COMPRESS}, tmp_path / "own")
    assert own.manifest.experts["two"].own_rows
    with pytest.raises(ModelError, match=r"no place for rows of its own beside the residual of 'lm_head\.weight'"):
        export_peft(own, "two", tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_a_heads_own_bias_of_another_length_beside_its_residual_is_refused_as_that(tmp_path: Path) -> None:
    originals = kin(tmp_path / "kin", "bias", [VOCAB, WIDE], [(), ADDED])
    experts = {name: str(original.path) for name, original in zip(("one", "two"), originals, strict=True)}
    bundle = merge({"experts": experts, "code": "factors", **COMPRESS}, tmp_path / "bundle")
    with pytest.raises(ModelError, match="no place for its own numbers beside the residual of an embedding or a head"):
        export_peft(bundle, "two", tmp_path / "two")


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@torch.no_grad()
def test_vllms_adapters_say_the_same_at_full_rank(architecture: str, tmp_path: Path) -> None:
    bundle = merged(architecture, tmp_path, code="int4", norms="average")
    plan = plan_vllm(bundle, max_rank=64)
    assert not plan.lost and {"embed_tokens", "lm_head"} <= set(plan.target_modules)
    write_vllm(plan, tmp_path / "vllm", samples=[CalibrationPrompt("w5 w6 w7")], device="cpu")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "vllm", dtype=torch.float32)
    with applied(base, read_adapter(load_file(tmp_path / "vllm/adapters/e1/adapter_model.safetensors"))):
        got = base(IDS).logits
    torch.testing.assert_close(got, load_model(bundle)(IDS, experts="e1").logits, atol=1e-4, rtol=0)
    cut = plan_vllm(bundle, max_rank=8)
    assert any("are cut to rank 8" in line for line in cut.lost)
