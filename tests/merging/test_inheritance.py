"""Two experts whose residuals are one: stored once, answered by both, and handed over when the first one goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from polymerge import Bundle, add_expert, export_dense, export_peft, load_model, merge, remove_expert, verify
from polymerge.bundle.adapter import adapter_of
from polymerge.bundle.inspect import inspect_bundle
from polymerge.bundle.manifest import ADAPTER_FILE, INHERITED_FILE
from polymerge.bundle.stored import dense_state
from polymerge.cli.inspect import inspect
from polymerge.errors import BundleError
from polymerge.export.vllm.plan import plan_vllm
from polymerge.merging import compress, run
from polymerge.merging.change import alone_with
from polymerge.merging.inheritance import hand_over
from polymerge.merging.proof import Proof
from tests.tiny import VOCAB, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
Q = "model.layers.0.self_attn.q_proj.weight"
IDS = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "groups"))


def merged(folder: Path, *, sharing: bool = True, architecture: str = "llama", count: int = 2, **recipe: Any) -> Bundle:
    """Of experts that are made when they are not there; without sharing, as if no two residuals were one."""
    experts = make_experts(architecture, folder, count=count)
    sources = {name: str(path) for name, path in experts.items()}
    with pytest.MonkeyPatch.context() as patch:
        if not sharing:
            patch.setattr(compress, "_error_with", lambda *args: None)
        recipe = {
            "experts": sources,
            "code": "factors",
            "compress_rate": 0.6,
            "norms": "average",
            "lm_head": "average",
            **recipe,
        }
        return merge({"embeddings": "average", **recipe}, folder / ("shared" if sharing else "apart"))


def answers(bundle: Bundle, experts: Any) -> torch.Tensor:
    with torch.no_grad():
        return load_model(bundle, device="cpu")(IDS, experts=experts).logits  # type: ignore[no-any-return]


def by_transformers(state: dict[str, torch.Tensor], folder: Path, architecture: str) -> torch.Tensor:
    """Logits of the model with these tensors."""
    like = transformers.AutoModelForCausalLM.from_pretrained(folder / f"{architecture}-0-0")
    model = type(like).from_pretrained(None, config=like.config, state_dict=state, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_both_answer_as_with_residuals_of_their_own(architecture: str, tmp_path: Path) -> None:
    shared = merged(tmp_path, architecture=architecture)
    apart = merged(tmp_path, architecture=architecture, sharing=False)
    layers = [layer for layer in shared.manifest.layers if layer.role == "linear"]
    assert all(layer.borrowed["e1"].of == "e0" for layer in layers) and shared.manifest.format_version == 5
    expected = {name: by_transformers(dense_state(shared, name), tmp_path, architecture) for name in ("e0", "e1", None)}
    for name, logits in expected.items():
        assert_close(answers(shared, name), logits)
    one, other = (dense_state(shared, name) for name in ("e0", "e1"))
    mixed = by_transformers({key: 0.3 * one[key] + 0.7 * other[key] for key in one}, tmp_path, architecture)
    assert_close(answers(shared, {"e0": 0.3, "e1": 0.7}), mixed)
    together = answers(shared, ["e1", None, "e0"])
    for row, name in enumerate(("e1", None, "e0")):
        assert_close(together[row], expected[name][row])
    for one, other in zip(shared.stats(), apart.stats(), strict=True):
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=1e-2)
    assert verify(shared, sources=True).problems == []


def test_the_scale_is_that_of_the_norms_and_the_residuals_are_half(tmp_path: Path) -> None:
    shared, apart = merged(tmp_path), merged(tmp_path, sharing=False)
    one, other = (load_file(tmp_path / f"llama-0-{number}" / "model.safetensors")[Q].double() for number in range(2))
    times = shared.layers[Q].borrowed["e1"].times
    assert times == pytest.approx(-float(other.norm() / one.norm()), rel=1e-6)
    b, a = shared.expert_reader("e1").factors(Q) or pytest.fail("has factors")
    lent = adapter_of(shared, "e0")
    module = Q.removesuffix(".weight")
    assert torch.equal(a, lent[f"{module}.lora_A.weight"])
    assert torch.equal(b, lent[f"{module}.lora_B.weight"] * times)
    assert torch.equal(b, adapter_of(shared, "e1")[f"{module}.lora_B.weight"])
    numbers = {
        b.path: [sum(t.numel() for t in load_file(b.expert_file(n)).values()) for n in ("e0", "e1")]
        for b in (shared, apart)
    }
    assert numbers[apart.path][0] == numbers[apart.path][1] == numbers[shared.path][0]
    assert numbers[shared.path][1] == 0


def test_who_borrows_is_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = merged(tmp_path)
    count = sum("e1" in layer.borrowed for layer in shared.manifest.layers)
    assert [expert.shared for expert in inspect_bundle(shared).experts] == [{}, {"e0": count}]
    inspect(shared.path)
    assert f"e1: {count} of its tensors lie in e0's file" in capsys.readouterr().out


def test_in_memory_the_factors_are_held_once(tmp_path: Path) -> None:
    shared, apart = (
        load_model(merged(tmp_path), device="cpu"),
        load_model(merged(tmp_path, sharing=False), device="cpu"),
    )
    held = [sum(b.numel() for n, b in m.named_buffers() if "stacked" in n) for m in (shared, apart)]
    assert 2 * held[0] == held[1]


@pytest.mark.parametrize("code", ["int8", "int4"])
def test_a_code_is_shared_too(code: str, tmp_path: Path) -> None:
    shared, apart = merged(tmp_path, code=code), merged(tmp_path, sharing=False, code=code)
    assert "e1" in shared.layers[Q].borrowed
    assert verify(shared, sources=True).problems == []
    for one, other in zip(shared.stats(), apart.stats(), strict=True):
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=2e-2)


def test_small_residuals_in_16_bits_stay_two(tmp_path: Path) -> None:
    """What the average lost in rounding is in both with one sign, and as large as they are."""
    experts = make_experts("llama", tmp_path, count=2, spread=5e-4, dtype=torch.bfloat16)
    sources = {name: str(path) for name, path in experts.items()}
    small = merge({"experts": sources, "code": "factors", "compress_rate": 0.3}, tmp_path / "small")
    assert not small.layers[Q].borrowed
    large = merged(tmp_path / "large", dtype="bfloat16")
    assert "e1" in large.layers[Q].borrowed


def test_three_experts_share_nothing(tmp_path: Path) -> None:
    assert not any(layer.borrowed for layer in merged(tmp_path, count=3).manifest.layers)


def test_peft_refuses_the_second_and_exports_give_it_whole(tmp_path: Path) -> None:
    shared = merged(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(shared.path)
    with pytest.raises(KeyError, match=r"POLYMERGE_SHARED.*export --to peft"):
        PeftModel.from_pretrained(base, shared.path / "experts" / "e1")
    export_peft(shared, "e1", tmp_path / "peft")
    written = load_file(tmp_path / "peft" / ADAPTER_FILE)
    module = Q.removesuffix(".weight")
    b, a = shared.expert_reader("e1").factors(Q) or pytest.fail("has factors")
    assert torch.equal(written[f"base_model.model.{module}.lora_A.weight"], a)
    assert torch.equal(written[f"base_model.model.{module}.lora_B.weight"], b)
    PeftModel.from_pretrained(base, tmp_path / "peft")
    export_dense(shared, "e1", tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        assert_close(answers(shared, "e1"), dense(IDS).logits)
    tasks = plan_vllm(shared).experts
    assert {task.module for task in tasks["e0"]} == {task.module for task in tasks["e1"]}


class TestChange:
    """Adding and removing."""

    @pytest.mark.parametrize("code", ["factors", "int4"])
    def test_who_stays_inherits_and_answers_to_the_bit(self, code: str, tmp_path: Path) -> None:
        bundle = merged(tmp_path, code=code)
        before, dense = answers(bundle, "e1"), bundle.reconstruct("e1", Q)
        bundle = remove_expert(bundle, "e0")
        assert bundle.layers[Q].borrowed["e1"].of is None
        assert f"experts/e1/{INHERITED_FILE}" in bundle.manifest.files
        assert torch.equal(bundle.reconstruct("e1", Q), dense)
        assert torch.equal(answers(bundle, "e1"), before)
        assert verify(bundle, sources=True).problems == []
        bundle = add_expert(bundle, "e0", tmp_path / "llama-0-0").bundle
        assert torch.equal(bundle.reconstruct("e1", Q), dense)
        assert verify(bundle, sources=True).problems == []

    def test_who_borrows_may_go(self, tmp_path: Path) -> None:
        bundle = merged(tmp_path)
        before = answers(bundle, "e0")
        bundle = remove_expert(bundle, "e1")
        assert torch.equal(answers(bundle, "e0"), before) and not bundle.layers[Q].borrowed
        assert bundle.manifest.format_version == 1
        assert verify(bundle, sources=True).problems == []

    def test_a_third_changes_nothing(self, tmp_path: Path) -> None:
        bundle = merged(tmp_path)
        before = answers(bundle, ["e0", "e1", "e0"])
        third = make_experts("llama", tmp_path / "third", seed=3, count=1)["e0"]
        bundle = add_expert(bundle, "e2", third).bundle
        assert torch.equal(answers(bundle, ["e0", "e1", "e0"]), before)
        assert set(bundle.layers[Q].borrowed) == {"e1"}
        assert verify(bundle, sources=True).problems == []

    def test_a_killed_removal_leaves_the_bundle_as_it_was(self, tmp_path: Path) -> None:
        bundle = merged(tmp_path)
        hand_over(bundle, "e0")  # and no further
        left = bundle.path / "experts" / "e1" / INHERITED_FILE
        assert left.exists() and verify(bundle).problems != []
        with alone_with(bundle.path):
            pass
        assert not left.exists() and verify(bundle, sources=True).problems == []


@pytest.mark.parametrize("times", [1.0, -0.5, 0.0])
def test_another_scale_is_found(times: float, tmp_path: Path) -> None:
    bundle = merged(tmp_path)
    edited(bundle, '"times": ', times)
    problems = verify(Bundle.open(bundle.path), sources=True).problems
    assert any("'e1'" in problem and Q in problem for problem in problems)


def test_factors_that_are_not_there_are_named(tmp_path: Path) -> None:
    bundle = merged(tmp_path)
    file = bundle.expert_file("e0")
    tensors = {key: value for key, value in load_file(file).items() if Q.removesuffix(".weight") not in key}
    save_file(tensors, file)
    with pytest.raises(BundleError, match=r"no factors of model.layers.0.self_attn.q_proj.*'e1'"):
        bundle.reconstruct("e1", Q)


def edited(bundle: Bundle, key: str, value: float) -> None:
    """The manifest with another number behind every such key."""
    file = bundle.path / "polymerge.json"
    lines = [f"{line.partition(key)[0]}{key}{value}" if key in line else line for line in file.read_text().split("\n")]
    manifest = json.loads("\n".join(lines))
    del manifest["versions"]["manifest"]  # its digest, which tells of any change
    file.write_text(json.dumps(manifest, indent=1))
