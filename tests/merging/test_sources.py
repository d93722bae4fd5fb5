"""`verify --sources`: every expert against its checkpoint, and what is said where they part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymerge import Bundle, merge, verify
from polymerge.errors import BundleError, SourceError
from tests.conftest import Merged
from tests.tiny import ARCHITECTURES, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "model.safetensors"
Q0, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def two(tmp_path: Path) -> dict[str, str]:
    return {name: str(path) for name, path in make_experts("llama", tmp_path, count=2).items()}


def edit(folder: str, name: str, by: float) -> None:
    tensors = load_file(Path(folder) / WEIGHTS)
    tensors[name].view(-1)[3] += by
    save_file(tensors, Path(folder) / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_every_architectures_experts_are_their_checkpoints(merged: Merged, architecture: str, rate: float) -> None:
    bundle, experts = merged(architecture, compress_rate=rate)
    result = verify(bundle, sources=True)
    assert result.problems == []
    assert [check.expert for check in result.sources] == list(experts)
    for check in result.sources:
        assert check.source == str(experts[check.expert])
        assert check.tensors == len(bundle.layers)
        roles = [layer.role for layer in bundle.layers.values()]
        linear, biases = roles.count("linear"), roles.count("bias")  # a bias is the base's and a difference
        if rate:
            assert check.tensors - linear - biases <= check.exact <= check.tensors - linear
            assert bundle.layers[check.worst_tensor].role == "linear"
            lines = [s["relative_error"] for s in bundle.stats() if s["expert"] == check.expert]
            assert check.worst_error == pytest.approx(max(lines), rel=1e-3)
        else:
            assert (check.exact, check.worst_error, check.worst_tensor) == (check.tensors, 0.0, "")


def test_without_sources_no_checkpoint_is_needed(two: dict[str, str], tmp_path: Path) -> None:
    bundle = merge({"experts": two, "code": "factors"}, tmp_path / "b")
    for path in two.values():
        shutil.rmtree(path)
    assert verify(bundle).ok and verify(bundle).sources == []
    with pytest.raises(SourceError, match=r"expert 'e0': .*; say where it is now with --source e0=PATH"):
        verify(bundle, sources=True)


def test_a_checkpoint_that_has_moved_is_found_where_the_user_says(two: dict[str, str], tmp_path: Path) -> None:
    bundle = merge({"experts": two, "code": "factors"}, tmp_path / "b")
    shutil.move(two["e1"], tmp_path / "elsewhere")
    result = verify(bundle, sources=True, source={"e1": str(tmp_path / "elsewhere")})
    assert result.ok and result.sources[1].source == str(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="no expert 'E1'"):
        verify(bundle, source={"E1": str(tmp_path / "elsewhere")})


@pytest.mark.parametrize("tensor", [Q0, NORM, "model.embed_tokens.weight", "lm_head.weight"])
def test_a_checkpoint_that_was_changed_is_a_problem_that_names_the_tensor(
    two: dict[str, str], tmp_path: Path, tensor: str
) -> None:
    bundle = merge({"experts": two, "code": "factors", "compress_rate": 0.5}, tmp_path / "b")
    edit(two["e1"], tensor, 10.0)
    [problem] = verify(bundle, sources=True).problems
    assert problem.startswith(f"expert 'e1': tensor {tensor!r} is ") and "is it the checkpoint" in problem


def test_the_sources_of_another_expert_are_a_problem(merged: Merged) -> None:
    bundle, experts = merged("llama", compress_rate=0.5)
    result = verify(bundle, sources=True, source={"e0": str(experts["e1"])})
    assert result.problems and all(problem.startswith("expert 'e0': ") for problem in result.problems)
    assert len(result.sources) == 3


def test_not_a_number_in_a_source_is_a_problem(two: dict[str, str], tmp_path: Path) -> None:
    bundle = merge({"experts": two, "code": "factors", "compress_rate": 0.5}, tmp_path / "b")
    edit(two["e0"], Q0, float("nan"))
    assert Q0 in verify(bundle, sources=True).problems[0]


def test_averaged_tensors_are_not_held_against_the_sources(two: dict[str, str], tmp_path: Path) -> None:
    kept = {"embeddings": "average", "lm_head": "average", "norms": "average"}
    bundle = merge({"experts": two, "code": "factors", "compress_rate": 1.0, **kept}, tmp_path / "b")
    result = verify(bundle, sources=True)
    assert result.ok and all(check.exact == 0 for check in result.sources)


def test_a_checkpoint_that_no_longer_fits_is_a_problem_and_no_traceback(two: dict[str, str], tmp_path: Path) -> None:
    bundle = merge({"experts": two, "code": "factors"}, tmp_path / "b")
    other = make_experts("gpt2", tmp_path, count=1)["e0"]
    result = verify(bundle, sources=True, source={"e0": str(other)})
    [problem] = result.problems
    assert str(other) in problem and "different architectures" in problem
    assert [check.expert for check in result.sources] == ["e1"]
    config = Path(two["e1"]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "gelu"}))
    assert "hidden_act" in verify(bundle, sources=True).problems[0]


def test_a_damaged_bundle_is_not_compared(two: dict[str, str], tmp_path: Path) -> None:
    bundle = merge({"experts": two, "code": "factors"}, tmp_path / "b")
    file = bundle.path / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = verify(bundle, sources=True)
    assert len(result.problems) == 1 and result.sources == []


def test_every_step_is_said(two: dict[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    bundle = merge({"experts": two, "code": "factors"}, tmp_path / "b")
    verify(bundle.path, sources=True, progress=said.append)
    steps = ["structure of e0", "structure of e1", "e0 against its source", "e1 against its source"]
    assert said == ["hashes", *steps, "the average against the sources"]


def test_rounding_to_the_bundles_dtype_is_no_problem(tmp_path: Path) -> None:
    made = make_experts("llama", tmp_path, count=2)
    recipe = {
        "experts": {n: str(p) for n, p in made.items()},
        "code": "factors",
        "compress_rate": 0.7,
        "dtype": "bfloat16",
    }
    bundle: Bundle = merge(recipe, tmp_path / "b")
    result = verify(bundle, sources=True)
    assert result.ok and 0 < result.sources[0].worst_error < 1
    edit(str(made["e0"]), NORM, 0.5)
    assert NORM in verify(bundle, sources=True).problems[0]
    assert torch.isfinite(bundle.base_tensor(NORM)).all()
