"""What experts keep of their own is stored once: the rows of an embedding that changed, and what two have alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from polymerge import Bundle, add_expert, export_dense, export_peft, load_model, merge, remove_expert, verify
from polymerge.bundle.adapter import adapter_of
from polymerge.bundle.kept import ROW_NUMBERS
from polymerge.bundle.stored import dense_state
from polymerge.errors import BundleError
from polymerge.merging import run
from polymerge.merging.proof import Proof
from tests.tiny import VOCAB, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
IDS = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
# Rows of the embedding that each expert's training has touched.
TOUCHED = {"e0": [3, 5, 17, 40], "e1": [5, 6, 90], "e2": [0, 17]}


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is proved is the architecture, which is the same in all of these."""
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "groups"))


def few_rows(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """Three fine-tunes whose embeddings differ in a few rows; the first two have a head and two matrices alike."""
    paths = make_experts(architecture, folder, dtype=dtype)
    files = {name: path / "model.safetensors" for name, path in paths.items()}
    first, untouched = load_file(files["e0"]), load_file(files["e2"])[EMBEDDING]
    for name, file in files.items():
        tensors = load_file(file)
        tensors[EMBEDDING] = untouched.clone()
        tensors[EMBEDDING][TOUCHED[name]] += 0.25
        if name == "e1":
            tensors |= {key: first[key].clone() for key in (HEAD, Q, UP) if key in first}
        save_file(tensors, file, {"format": "pt"})
    return paths


def merged(paths: dict[str, Path], output: Path, **settings: Any) -> Bundle:
    recipe = {"experts": {name: str(path) for name, path in paths.items()}, "code": "factors", "compress_rate": 0.5}
    return merge(recipe | settings, output)


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


CHANGED = sorted({row for rows in TOUCHED.values() for row in rows})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_no_expert_changed_are_stored_once(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = few_rows(tmp_path, dtype=dtype)
    bundle = merged(paths, tmp_path / "bundle")
    assert bundle.manifest.format_version == 6
    assert bundle.layers[EMBEDDING].rows == {name: len(CHANGED) for name in paths}
    stored = load_file(bundle.expert_file("e2"))
    numbers = next(tensor for key, tensor in stored.items() if key.endswith(ROW_NUMBERS))
    assert numbers.tolist() == CHANGED
    for name, path in paths.items():
        original = load_file(path / "model.safetensors")
        for tensor in (EMBEDDING, HEAD):
            assert torch.equal(bundle.reconstruct(name, tensor), original[tensor].float())
            module = tensor.removesuffix(".weight")
            assert torch.equal(adapter_of(bundle, name)[f"{module}.weight"], original[tensor])
    assert verify(bundle, sources=True).problems == []


def test_what_two_experts_have_alike_is_stored_once(tmp_path: Path) -> None:
    paths = few_rows(tmp_path)
    bundle = merged(paths, tmp_path / "bundle", code="int4")
    for tensor in (HEAD, Q, UP):
        lent = bundle.layers[tensor].borrowed
        assert list(lent) == ["e1"] and lent["e1"].of == "e0" and lent["e1"].times == 1
    keys = set(load_file(bundle.expert_file("e1")))
    assert not any("lm_head" in key or "layers.0.self_attn.q_proj" in key for key in keys)
    sizes = bundle.sizes().experts
    head = VOCAB * 48 * 4
    assert sizes["e1"] < sizes["e2"] - head
    assert [s["tensor"] for s in bundle.stats() if s["expert"] == "e1"] == [
        s["tensor"] for s in bundle.stats() if s["expert"] == "e2"
    ]


def test_published_factors_stay_each_experts_own(tmp_path: Path) -> None:
    """PEFT reads them where they lie."""
    bundle = merged(few_rows(tmp_path), tmp_path / "bundle")
    assert [tensor for tensor, layer in bundle.layers.items() if layer.borrowed] == [HEAD]


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("settings", [{"compress_rate": 0.0}, {"compress_rate": 0.0, "code": "int4"}])
def test_at_rate_0_every_expert_is_itself(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    paths = few_rows(tmp_path, architecture) if architecture != "gpt2" else make_experts("gpt2", tmp_path)
    bundle = merged(paths, tmp_path / "bundle", **settings)
    model = load_model(bundle, device="cpu")
    together = model(IDS, experts=list(paths)).logits
    for row, path in enumerate(paths.values()):
        torch.testing.assert_close(together[row], logits(path)[row], rtol=0, atol=1e-4)
    for name, path in paths.items():
        original = load_file(path / "model.safetensors")
        state = dense_state(bundle, name)
        assert all(torch.equal(state[key].float(), tensor.float()) for key, tensor in original.items() if key in state)
    assert verify(bundle, sources=True).problems == []


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_exports_have_all_rows(architecture: str, tmp_path: Path) -> None:
    paths = few_rows(tmp_path, architecture)
    bundle = merged(paths, tmp_path / "bundle", scale="shared")
    expected = {name: load_model(bundle, device="cpu")(IDS, experts=name).logits for name in paths}
    for name in ("e0", "e1"):
        export_dense(bundle, name, tmp_path / f"dense-{name}")
        torch.testing.assert_close(logits(tmp_path / f"dense-{name}"), expected[name])
        export_peft(bundle, name, tmp_path / f"peft-{name}")
        base = transformers.AutoModelForCausalLM.from_pretrained(bundle.path)
        adapted = PeftModel.from_pretrained(base, tmp_path / f"peft-{name}").eval()
        with torch.no_grad():
            torch.testing.assert_close(adapted(IDS).logits, expected[name], rtol=1e-4, atol=1e-4)


def test_peft_reads_the_folder_of_an_expert_with_a_few_rows(tmp_path: Path) -> None:
    bundle = merged(few_rows(tmp_path), tmp_path / "bundle", scale="shared")
    expected = load_model(bundle, device="cpu")(IDS, experts="e2").logits
    base = transformers.AutoModelForCausalLM.from_pretrained(bundle.path)
    adapted = PeftModel.from_pretrained(base, bundle.path / "experts" / "e2").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_who_had_another_ones_tensors_inherits_them(tmp_path: Path) -> None:
    paths = few_rows(tmp_path)
    bundle = merged(paths, tmp_path / "bundle", code="int4")
    before = dense_state(bundle, "e1")
    smaller = remove_expert(bundle, "e0")
    after = dense_state(smaller, "e1")
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    assert verify(smaller, sources=True).problems == []


def test_an_added_expert_has_its_changed_rows_alone(tmp_path: Path) -> None:
    paths = few_rows(tmp_path)
    last = paths.pop("e2")
    bundle = merged(paths, tmp_path / "bundle")
    assert set(bundle.layers[EMBEDDING].rows) == {"e0", "e1"}
    grown = add_expert(bundle, "late", str(last)).bundle
    original = load_file(last / "model.safetensors")
    mean_changed = sorted({row for name in ("e0", "e1") for row in TOUCHED[name]} | set(TOUCHED["e2"]))
    assert grown.layers[EMBEDDING].rows["late"] == len(mean_changed)
    assert torch.equal(grown.reconstruct("late", EMBEDDING), original[EMBEDDING])
    assert verify(grown, sources=True).problems == []


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    bundle = merged(few_rows(tmp_path), tmp_path / "bundle")
    file = bundle.expert_file("e2")
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(ROW_NUMBERS))
    for numbers in ([*CHANGED[:-1], VOCAB], CHANGED[::-1], [-1, *CHANGED[1:]]):
        save_file(tensors | {key: torch.tensor(numbers, dtype=torch.int32)}, file)
        with pytest.raises(BundleError, match=r"e2.*embed_tokens has .*copy the bundle again"):
            adapter_of(bundle, "e2")


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_what_an_averaged_table_loses_is_told(architecture: str, tmp_path: Path) -> None:
    paths = make_experts(architecture, tmp_path)
    bundle = merged(paths, tmp_path / "bundle", embeddings="average", lm_head="average")
    tables = [EMBEDDING, HEAD] if architecture == "llama" else [EMBEDDING]
    for name, path in paths.items():
        original = load_file(path / "model.safetensors")
        for tensor in tables:
            [line] = [s for s in bundle.stats() if s["tensor"] == tensor and s["expert"] == name]
            lost = (original[tensor] - bundle.base_tensor(tensor)).norm() / original[tensor].norm()
            assert line["relative_error"] == pytest.approx(float(lost), rel=1e-5) and line["energy_kept"] == 0
    assert verify(bundle, sources=True).problems == []
