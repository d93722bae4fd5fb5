"""The entropy code: what is read is what was written, in as many bytes as were promised, and nothing else is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polymerge.errors import BundleError, MissingExtraError
from polymerge.merging.plan import plan_merge
from polymerge.method.codes import code_of
from tests.conftest import Merged
from tests.method.test_quantised import normal

SCALES, STREAM = "lora.entropy_scale", "lora.entropy"


def test_without_its_package_it_is_refused_before_the_merge(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    _, experts = merged("llama", compress_rate=0.7)
    monkeypatch.setitem(sys.modules, "constriction", None)  # as if it were not installed
    sources = {name: str(path) for name, path in experts.items()}
    with pytest.raises(
        MissingExtraError, match=r"constriction is not installed; pip install -e '\.\[entropy\]' in your clone"
    ):
        plan_merge({"experts": sources, "code": "entropy"})


def factors(sizes: torch.Tensor, out_features: int = 300, in_features: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Components of these singular values: B with orthonormal columns, A with orthogonal rows."""
    b = torch.linalg.qr(normal(out_features, len(sizes))).Q
    a = torch.linalg.qr(normal(in_features, len(sizes), seed=1)).Q.T
    return b, sizes[:, None] * a


@pytest.fixture
def code() -> object:
    pytest.importorskip("constriction")
    return code_of("entropy", torch.bfloat16)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("fall", [0.0, 0.5, 3.0])
def test_factors_of_any_size_come_back(code: object, size: float, fall: float) -> None:
    b, a = factors(size * torch.arange(1, 41).float() ** -fall)
    stored = code.encode(b, a)  # type: ignore[attr-defined]
    assert sum(part.nbytes for part in stored.values()) == code.bytes(300, 200, 40)  # type: ignore[attr-defined]
    b_again, a_again = code.decode(stored, 300, 200)  # type: ignore[attr-defined]
    error = (b.double() @ a.double() - b_again.double() @ a_again.double()).norm()
    assert error <= 0.25 * a.double().norm()


def test_one_huge_component_and_numbers_that_no_normal_distribution_has(code: object) -> None:
    b, a = factors(torch.tensor([1e6, 1.0, 1.0]))
    a[1, 0], b[5, 2] = 40.0, -30.0
    b_again, a_again = code.decode(code.encode(b, a), 300, 200)  # type: ignore[attr-defined]
    assert bool(b_again.isfinite().all() and a_again.isfinite().all())
    assert float((b @ a - b_again @ a_again).norm()) <= 0.05 * 1e6


def test_the_smallest_matrices_fit(code: object) -> None:
    for shape in ((1, 1), (1, 30), (3, 4)):
        b, a = normal(shape[0], 1), normal(1, shape[1], seed=2)
        stored = code.encode(b, a)  # type: ignore[attr-defined]
        assert stored[STREAM].shape[1] + 4 == code.bytes(*shape, 1)  # type: ignore[attr-defined]
        code.decode(stored, *shape)  # type: ignore[attr-defined]


def test_same_factors_same_bytes(code: object) -> None:
    b, a = factors(torch.arange(1, 41).float() ** -0.5)
    first, second = code.encode(b, a), code.encode(b.clone(), a.clone())  # type: ignore[attr-defined]
    assert all(torch.equal(first[suffix], second[suffix]) for suffix in (SCALES, STREAM))


def test_a_stream_that_was_changed_is_refused(code: object) -> None:
    b, a = factors(torch.arange(1, 41).float() ** -0.5)
    stored = code.encode(b, a)  # type: ignore[attr-defined]
    for place in (0, 50, 2000):
        changed = stored[STREAM].clone()
        changed[0, place] ^= 64
        with pytest.raises(ValueError, match="does not decode to the numbers that were encoded"):
            code.decode(stored | {STREAM: changed}, 300, 200)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="expected"):
        code.decode(stored | {STREAM: stored[STREAM][:, :-4]}, 300, 200)  # type: ignore[attr-defined]


@torch.no_grad()
def test_a_bundle_with_it_says_what_its_experts_are(merged: Merged, tmp_path: Path) -> None:
    pytest.importorskip("constriction")
    from polymerge import export_dense, load_model, merge, verify

    _, experts = merged("llama", compress_rate=0.7)
    sources = {name: str(path) for name, path in experts.items()}
    bundle = merge({"experts": sources, "compress_rate": 0.7, "code": "entropy"}, tmp_path / "bundle")
    assert verify(bundle, sources=True).problems == []
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = load_model(bundle)(ids, experts="e1").logits
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(export_dense(bundle, "e1", tmp_path / "dense")).eval()
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=0)
    file = bundle.expert_file("e1")
    stream = next(tensor for key, tensor in load_file(file).items() if key.endswith(STREAM))
    data = bytearray(file.read_bytes())
    data[data.find(stream.numpy().tobytes()) + 40] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"does not decode to the numbers that were encoded; copy the bundle again"):
        load_model(bundle.path)
