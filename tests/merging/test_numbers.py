"""In a bundle with a code, a residual that numbers are nearer to is stored as numbers: adapters that were merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from polymerge import Bundle, add_expert, export_peft, load_model, merge, remove_expert, verify
from polymerge.bundle.stored import dense_state
from polymerge.merging import run
from polymerge.merging.proof import Proof
from tests.sources.peft_oracle import write_adapter
from tests.tiny import VOCAB, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
Q = "model.layers.0.self_attn.q_proj.weight"
IDS = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "groups"))


def merged_adapters(folder: Path, count: int = 3) -> dict[str, str]:
    """Whole checkpoints: adapters of rank 1 over one model, merged into it by PEFT."""
    base = make_experts("llama", folder, count=1)["e0"]
    sources = {}
    for number in range(count):
        adapter = write_adapter(folder / f"lora{number}", base, seed=number, r=1, target_modules=["q_proj", "up_proj"])
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder / f"e{number}")
        sources[f"e{number}"] = str(folder / f"e{number}")
    return sources


def bundle_of(folder: Path, sources: dict[str, str], **recipe: Any) -> Bundle:
    # every expert with a norm of its own would have a little of the whole matrix in its residual
    settings = {"compress_rate": 0.6, "code": "int4", "embeddings": "average", "scale": "shared", **recipe}
    return merge({"experts": sources, **settings}, folder / "bundle", overwrite=True)


def original(source: str) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = transformers.AutoModelForCausalLM.from_pretrained(source).eval()(IDS).logits
    return logits


@pytest.mark.parametrize("code", ["int4", "int8", "auto"])
def test_merged_adapters_are_near_as_numbers(tmp_path: Path, code: str) -> None:
    sources = merged_adapters(tmp_path)
    bundle = bundle_of(tmp_path, sources, code=code)
    assert bundle.manifest.format_version == 7
    assert set(bundle.layers[Q].numbers) == set(sources)
    assert max(line["relative_error"] for line in bundle.stats()) < 2e-3  # rounded to 4 bits it is 0.03
    assert not verify(bundle).problems
    with torch.no_grad():
        answers = load_model(bundle, device="cpu")(IDS, experts=list(sources)).logits
    for row, source in enumerate(sources.values()):
        torch.testing.assert_close(answers[row], original(source)[row], rtol=1e-3, atol=5e-3)


def test_others_keep_the_code_and_the_version(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path)
    bundle = bundle_of(tmp_path, {name: str(path) for name, path in experts.items()}, lm_head="average")
    assert not any(layer.numbers for layer in bundle.layers.values())
    assert bundle.manifest.format_version == 2


def test_a_twin_has_the_other_ones_numbers_and_inherits_them(tmp_path: Path) -> None:
    sources = merged_adapters(tmp_path, 2)
    bundle = bundle_of(tmp_path, {**sources, "twin": sources["e0"]})
    assert "twin" in bundle.layers[Q].borrowed
    assert set(bundle.layers[Q].numbers) == {*sources, "twin"}
    before = dense_state(bundle, "twin")[Q]
    left = remove_expert(bundle, "e0")
    assert set(left.layers[Q].numbers) == {"e1", "twin"}
    assert torch.equal(dense_state(left, "twin")[Q], before)
    assert not verify(left).problems


def test_an_added_one_may_have_numbers_where_the_others_have_the_code(tmp_path: Path) -> None:
    sources = merged_adapters(tmp_path, 1)
    base = str(tmp_path / "llama-0-0")
    bundle = bundle_of(tmp_path, {"one": base, "same": base}, lm_head="average")
    assert bundle.manifest.format_version in (2, 6)
    added = add_expert(bundle, "lora", sources["e0"]).bundle
    assert added.layers[Q].numbers == ("lora",)
    assert added.manifest.format_version == 7
    with torch.no_grad():
        answers = load_model(added, device="cpu")(IDS, experts="lora").logits
    torch.testing.assert_close(answers, original(sources["e0"]), rtol=1e-3, atol=1e-3)
    assert not verify(added, sources=True).problems


def test_peft_opens_its_export(tmp_path: Path) -> None:
    sources = merged_adapters(tmp_path)
    bundle = bundle_of(tmp_path, sources)
    out = export_peft(bundle, "e1", tmp_path / "peft").folder
    model = transformers.AutoModelForCausalLM.from_pretrained(bundle.path)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(model, out).eval()(IDS).logits
    torch.testing.assert_close(logits, load_model(bundle, device="cpu")(IDS, experts="e1").logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_default_bundle_in_16_bits_is_loaded_as_precisely_as_it_is_stored(tmp_path: Path, dtype: str) -> None:
    """Experts far apart: 16 bits round what four bits and a scale say, and a residual is large here."""
    experts = {name: str(path) for name, path in make_experts("llama", tmp_path, spread=0.2).items()}
    bundle = merge({"experts": experts, "compress_rate": 0.5, "dtype": dtype}, tmp_path / "bundle")
    assert bundle.manifest.method.code == "int4"
    config = transformers.AutoConfig.from_pretrained(experts["e1"])
    dense = transformers.LlamaForCausalLM(config).eval()
    dense.load_state_dict({key: tensor.float() for key, tensor in dense_state(bundle, "e1", torch.float32).items()})
    with torch.no_grad():
        answers = load_model(bundle, device="cpu", dtype="float32")(IDS, experts="e1").logits
        torch.testing.assert_close(answers, dense(IDS).logits, rtol=1e-3, atol=1e-3)
