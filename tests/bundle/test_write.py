"""What a bundle's folder is put together from: shards, configuration, tokenizer files, scales, statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from polymerge.bundle import write
from polymerge.bundle.files import entry_of, raw_bytes
from polymerge.bundle.write import (
    bundle_config,
    copy_model_files,
    write_manifest,
    write_scales,
    write_stats,
    write_weights,
)
from polymerge.sources.checkpoint import open_folder
from tests.conftest import Merged


def weights(count: int = 5) -> dict[str, torch.Tensor]:
    return {f"layers.{n}.weight": torch.full((2, 2), float(n)) for n in range(count)}  # 16 bytes each


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    values = list(tensors.values())
    return list(write_weights(folder, entries, lambda index: [bytes(raw_bytes(values[index]))]))


@pytest.mark.parametrize(
    ("limit", "sizes"), [(1000, [5]), (80, [5]), (79, [4, 1]), (32, [2, 2, 1]), (20, [1] * 5), (1, [1] * 5)]
)
def test_shards_hold_no_more_than_their_limit_and_never_part_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", limit)
    names = written(tmp_path, weights())
    if len(sizes) == 1:
        assert names == ["model.safetensors"]
        assert len(load_file(tmp_path / names[0])) == 5
        return
    assert names[-1] == "model.safetensors.index.json"
    assert names[:-1] == [f"model-{n:05d}-of-{len(sizes):05d}.safetensors" for n in range(1, len(sizes) + 1)]
    assert [len(load_file(tmp_path / name)) for name in names[:-1]] == sizes
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == 80
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_folder(tmp_path, "x")  # refuses an index that is not its shards'
    assert all(torch.equal(checkpoint.read(name), value) for name, value in weights().items())


def test_transformers_opens_a_sharded_average(merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = merged("llama", compress_rate=0.9)
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
    tensors = {name: bundle.base_tensor(name) for name in bundle.layers}
    assert len(written(tmp_path, tensors)) > 3
    (tmp_path / "config.json").write_bytes((bundle.path / "config.json").read_bytes())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_code_in_a_source_is_left_behind_unless_the_user_trusts_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    files = ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "generation_config.json"]
    for name in (*files, "modeling_evil.py", "notes.txt", "pytorch_model.bin"):
        (source / name).write_text(name)
    entries = copy_model_files(source, tmp_path / "plain", {"a": 1}, code=False)
    assert set(entries) == {"config.json", *files}
    assert {str(f.relative_to(tmp_path / "plain")) for f in (tmp_path / "plain").rglob("*") if f.is_file()} == set(
        entries
    )
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == {"a": 1}
    trusted = copy_model_files(source, tmp_path / "trusted", {}, code=True)
    assert set(trusted) == {*entries, "modeling_evil.py"}
    assert (tmp_path / "trusted" / "modeling_evil.py").read_text() == "modeling_evil.py"


def test_the_averages_configuration_is_the_first_experts_but_for_dtype_tying_and_code() -> None:
    config = {
        "_name_or_path": "/home/me",
        "torch_dtype": "float16",
        "auto_map": {"AutoModel": "x.Y"},
        "rope_theta": 5.0,
    }
    changed = bundle_config(config, dtype="bfloat16", tied=True, code=False)
    assert changed == {"rope_theta": 5.0, "dtype": "bfloat16"}
    assert bundle_config(config, dtype="bfloat16", tied=False, code=True) == {
        "auto_map": {"AutoModel": "x.Y"},
        "rope_theta": 5.0,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    tied = {"tie_word_embeddings": True, "dtype": "float32"}
    assert bundle_config(tied, dtype="float32", tied=False, code=False)["tie_word_embeddings"] is False
    assert "auto_map" in config and "torch_dtype" in config  # the source's own is not touched


def test_scales_come_back_in_float32(tmp_path: Path) -> None:
    write_scales(tmp_path / "scales", {"b.weight": 1.0028, "a.weight": 0.5})
    loaded = load_file(tmp_path / "scales")
    assert loaded["b.weight"].shape == (1,) and loaded["b.weight"].dtype == torch.float32
    assert loaded["b.weight"].item() == torch.tensor(1.0028).item() and loaded["a.weight"].item() == 0.5


def test_statistics_are_a_line_each(tmp_path: Path) -> None:
    write_stats(tmp_path, [{"a": 1, "shape": (2, 3)}, {"b": None}])
    lines = (tmp_path / "merge_stats.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"a": 1, "shape": [2, 3]}, {"b": None}]
    write_stats(tmp_path, [])
    assert (tmp_path / "merge_stats.jsonl").read_bytes() == b""


def test_a_manifest_replaces_another_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_manifest(tmp_path, text)
        assert [path.name for path in tmp_path.iterdir()] == ["polymerge.json"]
        assert (tmp_path / "polymerge.json").read_text() == text
