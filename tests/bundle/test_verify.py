"""Hashes and structure: any changed byte is found, and so is what is whole and does not fit."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config

from polymerge import Bundle, merge, upgrade
from polymerge.bundle.verify import adapter_problems, base_problems, verify_files
from polymerge.errors import BundleError
from tests.conftest import Merged
from tests.tiny import ARCHITECTURES, COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**COMMON, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
WEIGHTS, ADAPTER = "model.safetensors", "experts/e0/adapter_model.safetensors"
SCALES = "experts/e0/scales.safetensors"
LISTED = [
    "config.json", "generation_config.json", WEIGHTS,
    *(f"experts/{expert}/{file}" for expert in ("e0", "e1")
      for file in ("adapter_config.json", "adapter_model.safetensors", "scales.safetensors")),
]  # fmt: skip
UP = "model.layers.0.mlp.up_proj"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    experts = make_experts("llama", folder, count=2, config=LlamaConfig(**TINY))
    return merge(
        {"experts": {n: str(p) for n, p in experts.items()}, "code": "factors", "compress_rate": 0.6}, folder / "b"
    ).path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "b"))


def test_the_manifest_lists_every_file_but_itself_and_the_statistics(whole: Path) -> None:
    files = {str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()}
    assert files - {"polymerge.json", "merge_stats.jsonl"} == set(Bundle.open(whole).manifest.files) == set(LISTED)


@pytest.mark.parametrize("name", LISTED)
def test_any_changed_byte_of_any_file_is_found(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    draw = random.Random(name)
    for place in (0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(15))):
        changed = bytearray(data)
        changed[place] ^= draw.choice([1, 2, 4, 8, 16, 32, 64, 128])
        (copy / name).write_bytes(changed)
        problems = verify_files(Bundle.open(copy)).problems
        assert len(problems) == 1 and name in problems[0], (place, problems)
    (copy / name).write_bytes(data)
    assert verify_files(Bundle.open(copy)).ok


@pytest.mark.parametrize("name", LISTED)
def test_a_file_of_another_size_or_none_is_found_on_opening(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    for other in (data[:-1], data + b"\n", b""):
        (copy / name).write_bytes(other)
        with pytest.raises(BundleError, match=name):
            Bundle.open(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: missing"):
        Bundle.open(copy)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_a_bundle_of_any_architecture_is_whole(merged: Merged, architecture: str, rate: float) -> None:
    bundle, _ = merged(architecture, compress_rate=rate)
    result = verify_files(bundle)
    assert result.problems == [] and result.ok
    assert result.files == len(bundle.manifest.files) and result.sources == []


def edited(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Bundle:
    """The bundle with changed tensors, and hashes that are right again."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, {"format": "pt"})
    return signed(folder, name)


def signed(folder: Path, name: str) -> Bundle:
    manifest = json.loads((folder / "polymerge.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "polymerge.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


A, B = f"{PREFIX}{UP}.lora_A.weight", f"{PREFIX}{UP}.lora_B.weight"
# A file, what is done to it, and the words of the one problem.
MISFITS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], list[str]]] = {
    "the base lacks a tensor": (WEIGHTS, drop("model.norm.weight"), ["base", "'model.norm.weight'", "is missing"]),
    "the base has one more": (WEIGHTS, put("x", torch.ones(1)), ["base", "'x'", "not in the manifest"]),
    "the base's shape": (
        WEIGHTS, put("model.norm.weight", torch.ones(17)), ["'model.norm.weight' is [17]", "manifest says [16]"]
    ),
    "no tensor of the base": (
        ADAPTER, put(f"{PREFIX}model.layers.7.x.weight", torch.ones(1)), ["'e0'", "layers.7.x.weight", "no tensor"]
    ),
    "a norm of another size": (
        ADAPTER, put(f"{PREFIX}model.norm.weight", torch.ones(17)), ["'e0'", "'model.norm.weight' is [17]", "[16]"]
    ),
    "factors of a norm": (
        ADAPTER, put(f"{PREFIX}model.norm.lora_A.weight", torch.ones(1, 16)), ["model.norm.lora_A.weight", "no tensor"]
    ),
    "not a number": (
        ADAPTER, lambda t: t[f"{PREFIX}model.norm.weight"].fill_(float("nan")), ["'model.norm.weight'", "NaN"]
    ),
    "A of another width": (ADAPTER, lambda t: t.update({A: t[A][:, 1:].contiguous()}), [f"{UP}.lora_A.weight", "15]"]),
    "B of another height": (ADAPTER, lambda t: t.update({B: t[B][1:].contiguous()}), [f"{UP}.lora_B.weight", "[23, "]),
    "a ratio of no tensor": (SCALES, put("x", torch.ones(1)), ["'e0'", "'x'", "not in the base"]),
    "a ratio that is no number": (
        SCALES, put(f"{UP}.weight", torch.tensor([float("inf")])), ["scale inf", UP]
    ),
    "a negative ratio": (
        SCALES, put(f"{UP}.weight", torch.tensor([-1.0])), ["scale -1.0", UP, "not a ratio"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", MISFITS)
def test_what_does_not_fit_is_one_problem_that_names_it(copy: Path, row: str) -> None:
    name, change, words = MISFITS[row]
    problem, *others = verify_files(edited(copy, name, change)).problems
    assert not [word for word in words if word not in problem], problem
    # The settings follow from the tensors, and the other one of two experts has the same factors.
    assert all("adapter_config.json" in other or "expert 'e1'" in other for other in others)


def test_a_rank_that_the_factors_do_not_share_is_a_problem(copy: Path) -> None:
    bundle = edited(copy, ADAPTER, lambda tensors: tensors.update({A: tensors[A][1:].contiguous()}))
    [problem] = adapter_problems(bundle, "e0")
    assert f"{UP}.lora_B.weight" in problem
    [same] = adapter_problems(bundle, "e1")  # one of two, which has the same factors
    assert "'e1'" in same and UP in same and list(base_problems(bundle)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("r", 2),
        ("lora_alpha", 64),
        ("rank_pattern", {}),
        ("alpha_pattern", {"x": 1}),
        ("target_modules", ["q_proj"]),
        ("modules_to_save", None),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
    ],
)
def test_settings_that_do_not_follow_from_the_tensors_are_a_problem(copy: Path, key: str, value: Any) -> None:
    file = copy / "experts" / "e0" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config[key] != value
    file.write_text(json.dumps({**config, key: value}))
    bundle = signed(copy, "experts/e0/adapter_config.json")
    [problem] = verify_files(bundle).problems
    assert "'e0'" in problem and repr(key) in problem


@pytest.mark.parametrize("bit", [1, 2, 4])
def test_a_changed_bit_in_how_often_a_residual_is_lent_is_a_problem(copy: Path, bit: int) -> None:
    text = (copy / "polymerge.json").read_text()
    assert verify_files(Bundle.open(copy)).ok
    place = text.index('"times": -') + len('"times": -')
    number = text[place : text.index("\n", place)]
    digit = place + number.index(".") + 2
    (copy / "polymerge.json").write_text(text[:digit] + chr(ord(text[digit]) ^ bit) + text[digit + 1 :])
    [problem] = verify_files(Bundle.open(copy)).problems
    assert "times the residual of 'e0' in" in problem and "expert 'e1'" in problem


@pytest.mark.parametrize(
    "change",
    [
        lambda said: next(layer for layer in said["layers"] if layer["mean_scale"]).update(mean_scale=1.001),
        lambda said: said["experts"]["e0"].update(sha256="0" * 64),
        lambda said: said["experts"]["e0"].update(source="elsewhere"),
        lambda said: said["method"].update(seed=1),
        lambda said: said.update(scale_ratio_range=[0.5, 2.0]),
        lambda said: said.update(notes=["all is well"]),
        lambda said: said["versions"].update(torch="1.0"),
        lambda said: said["versions"].update(manifest="sha256:" + "0" * 64),
    ],
)
def test_a_number_that_only_the_manifest_has_cannot_change_unseen(
    copy: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    file = copy / "polymerge.json"
    assert verify_files(Bundle.open(copy)).sealed
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))
    assert verify_files(Bundle.open(copy)).problems == [
        "polymerge.json: was changed by hand or damaged: it has another digest than it says"
    ]


def test_a_manifest_without_a_digest_is_an_older_one(copy: Path) -> None:
    file = copy / "polymerge.json"
    said = json.loads(file.read_text())
    del said["versions"]["manifest"]
    file.write_text(json.dumps(said))
    checked = verify_files(Bundle.open(copy))
    assert checked.ok and not checked.sealed
    assert upgrade(copy).files == ("polymerge.json",)
    assert verify_files(Bundle.open(copy)).sealed


def test_a_bias_of_another_size_is_a_problem(tmp_path: Path) -> None:
    experts = make_experts("qwen2", tmp_path, count=2, config=Qwen2Config(**TINY))
    bundle = merge(
        {"experts": {n: str(p) for n, p in experts.items()}, "code": "factors", "compress_rate": 0.6}, tmp_path / "b"
    )
    key = "model.layers.0.self_attn.q_proj.lora_B.bias"
    changed = edited(bundle.path, ADAPTER, put(PREFIX + key, torch.ones(3)))
    [problem] = verify_files(changed).problems
    assert f"{key!r} is [3], expected [16]" in problem


def test_every_step_is_said_and_damage_ends_it(copy: Path) -> None:
    said: list[str] = []
    verify_files(Bundle.open(copy), said.append)
    assert said == ["hashes", "structure of e0", "structure of e1"]
    (copy / "config.json").write_bytes((copy / "config.json").read_bytes()[::-1])
    said.clear()
    assert not verify_files(Bundle.open(copy), said.append).ok
    assert said == ["hashes"]
