"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymerge.bundle.files import (
    DTYPE_NAMES,
    Piece,
    check_free_space,
    disk_errors,
    raw_bytes,
    scratch_name,
    scratches_of,
    write_bytes,
    write_json,
    write_pieces,
    write_safetensors,
    zeros_piece,
)
from polymerge.errors import DiskSpaceError, PolymergeError


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_a_streamed_file_is_the_one_that_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, shape in {"a.weight": (3, 5), "b": (), "c": (7,), "none": (0, 4)}.items()
    }
    entries = [(name, DTYPE_NAMES[dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()]
    entry = write_safetensors(tmp_path / "ours", entries, (bytes(raw_bytes(t)) for t in tensors.values()))
    ours = load_file(tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert ours.keys() == tensors.keys() and all(torch.equal(ours[name], tensors[name]) for name in tensors)
    assert entry.bytes == (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    assert entry.sha256 == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()


def test_a_file_whose_content_is_short_is_not_put_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(PolymergeError, match="expected 8 bytes of tensors, got 4"):
        write_safetensors(tmp_path / "x", [("a", "F32", (2,), 8)], [bytes(4)])
    assert (tmp_path / "x").read_text() == "old"


def test_pieces_lie_in_the_order_given_and_zeros_lie_nowhere(tmp_path: Path) -> None:
    pieces = [Piece(None, "b", "F32", (2,), 8, "file"), zeros_piece("e", "a", "BF16", (2, 3))]
    content = {"file": torch.tensor([1.0, 2.0]).numpy().tobytes(), "": bytes(12)}
    write_pieces(tmp_path / "x", pieces, lambda piece: [content[piece.file]])
    loaded = load_file(tmp_path / "x")
    assert loaded["b"].tolist() == [1.0, 2.0]
    assert torch.equal(loaded["a"], torch.zeros(2, 3, dtype=torch.bfloat16))


def test_json_keeps_its_keys_in_order_and_its_hash_is_the_files(tmp_path: Path) -> None:
    data = {"z": [1, 2, 3], "a": {"text": "ρ [1, 2]"}, "none": []}
    entry = write_json(tmp_path / "x.json", data)
    text = (tmp_path / "x.json").read_bytes()
    assert json.loads(text) == data and list(json.loads(text)) == ["z", "a", "none"]
    assert b"[1, 2, 3]" in text
    assert (entry.bytes, entry.sha256) == (len(text), hashlib.sha256(text).hexdigest())


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "x", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DiskSpaceError, match="the disk is full"):
            write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize(("code", "said"), [(errno.EFBIG, "too large"), (errno.EDQUOT, "disk is full")])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path, code: int, said: str) -> None:
    with pytest.raises(DiskSpaceError, match=said), disk_errors(tmp_path):
        raise OSError(code, "reason")
    with pytest.raises(OSError, match="reason") as other, disk_errors(tmp_path):
        raise OSError(errno.EIO, "reason")
    assert not isinstance(other.value, PolymergeError)


def test_free_space_is_asked_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(DiskSpaceError, match=r"writes 1000000000\.00 GB"):
        check_free_space(tmp_path / "not" / "yet", 10**18)


def test_what_a_killed_write_left_is_found_by_its_target_alone(tmp_path: Path) -> None:
    for target in (tmp_path / "x", tmp_path / ("y" * 255)):
        left = target.with_name(scratch_name(target))
        left.write_text("half")
        write_bytes(target, b"whole")
        assert scratches_of(target) == [left]
    assert scratches_of(tmp_path / "z") == [] == scratches_of(tmp_path / "no" / "x")


def test_a_write_touches_no_file_but_its_target(tmp_path: Path) -> None:
    names = ["x.writing", "x.partial", "x.previous", ".x.polymerge.lock", ".x"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and not (tmp_path / "x").is_symlink()
    assert all((tmp_path / name).read_text() == "mine" for name in [*names, "elsewhere"])
