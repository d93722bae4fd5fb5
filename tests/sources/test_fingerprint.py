"""What tells one file of weights from another: its bytes, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymerge.errors import SourceError
from polymerge.sources.fingerprint import SAMPLE, SAMPLES, digest_beside, digest_of
from polymerge.sources.opening import open_checkpoint

LARGE = SAMPLE * SAMPLES * 3


def levelled(folder: Path) -> Path:
    """As in the layers of an image: all times are one."""
    for file in folder.iterdir():
        os.utime(file, ns=(0, 0))
    return folder


@pytest.fixture
def large(tmp_path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{n}": torch.randn(64, 1024, generator=generator) for n in range(LARGE // (64 * 1024 * 4) + 1)} | {
        "norm": torch.ones(64)
    }


def test_one_number_of_any_tensor_between_the_samples_may_hide_but_no_whole_tensor(
    large: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(large, tmp_path / "a.safetensors")
    first = digest_of(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size > SAMPLE * SAMPLES
    seen = {first}
    for name, tensor in large.items():
        save_file({**large, name: tensor + 1e-3}, tmp_path / "b.safetensors")
        seen.add(digest_of(tmp_path / "b.safetensors"))
    assert len(seen) == len(large) + 1


def test_names_and_times_do_not_count_and_sizes_and_headers_do(large: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(large, tmp_path / "a.safetensors")
    shutil.copyfile(tmp_path / "a.safetensors", tmp_path / "copy")
    os.utime(tmp_path / "copy", ns=(1, 1))
    assert digest_of(tmp_path / "copy") == digest_of(tmp_path / "a.safetensors")
    renamed = {f"{name}x": tensor for name, tensor in large.items()}
    save_file(renamed, tmp_path / "b.safetensors")
    assert digest_of(tmp_path / "b.safetensors") != digest_of(tmp_path / "a.safetensors")
    with (tmp_path / "copy").open("ab") as handle:
        handle.write(b"\0")
    assert digest_of(tmp_path / "copy") != digest_of(tmp_path / "a.safetensors")


@pytest.mark.parametrize("size", [0, 1, 7, 8, SAMPLE * SAMPLES, SAMPLE * SAMPLES + 1, LARGE])
@pytest.mark.parametrize("start", [b"", b"GGUF", b"\xff" * 8, b'\x05\0\0\0\0\0\0\0{"a":', b"\x02\0\0\0\0\0\0\0[]"])
def test_any_bytes_at_all_have_a_digest(tmp_path: Path, size: int, start: bytes) -> None:
    (tmp_path / "x").write_bytes((start + bytes(size))[:size])
    one = digest_of(tmp_path / "x")
    assert len(one) == 64
    if size:
        (tmp_path / "x").write_bytes((start + bytes(size))[: size - 1] + b"!")
        assert digest_of(tmp_path / "x") != one


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        digest_of(tmp_path / "x")


def test_two_models_of_equal_sizes_names_and_times_are_two(checkpoints, tmp_path: Path) -> None:
    experts = checkpoints("llama")
    one, other = (levelled(Path(shutil.copytree(experts[name], tmp_path / name / "m"))) for name in ("e0", "e1"))
    stats = [[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(m.iterdir())] for m in (one, other)]
    assert stats[0] == stats[1]
    first, second = (open_checkpoint(str(m)).fingerprint() for m in (one, other))
    assert first != second
    assert open_checkpoint(str(experts["e0"])).fingerprint() == first


def test_what_lies_beside_the_weights_counts_for_answers(checkpoints, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints("llama")["e0"], tmp_path / "m"))
    before = digest_beside(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors")
    assert digest_beside(folder) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    changed = digest_beside(folder)
    (folder / "chat_template.jinja").write_text("x")
    assert len({before, changed, digest_beside(folder)}) == 3
