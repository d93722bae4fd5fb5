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

from polymerge.bundle import files
from polymerge.bundle.files import (
    DTYPE_NAMES,
    Entry,
    Rows,
    check_free_space,
    chunks_of,
    disk_errors,
    entry_of,
    header_of,
    header_room,
    raw_bytes,
    scratch_name,
    scratches_of,
    slabs,
    write_bytes,
    write_json,
    write_safetensors,
)
from polymerge.errors import DiskSpaceError, PolymergeError


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_a_streamed_file_is_the_one_that_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, shape in {"a.weight": (3, 5), "b": (), "c": (7,), "none": (0, 4)}.items()
    }
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    entry = write_safetensors(tmp_path / "ours", entries, (bytes(raw_bytes(t)) for t in tensors.values()))
    ours = load_file(tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert ours.keys() == tensors.keys() and all(torch.equal(ours[name], tensors[name]) for name in tensors)
    assert entry.bytes == (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    assert entry.sha256 == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()


def test_a_file_whose_content_is_short_is_not_put_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(PolymergeError, match="expected 8 bytes of tensors, got 4"):
        write_safetensors(tmp_path / "x", [Entry("a", "F32", (2,), 8)], [bytes(4)])
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("room", [0, 8, 400, 4000])
def test_spaces_fill_a_headers_room_and_the_library_reads_it(tmp_path: Path, room: int) -> None:
    values = {"b": torch.tensor([1.0, 2.0]), "a": torch.zeros(2, 3, dtype=torch.bfloat16)}
    head = header_of([entry_of(key, value) for key, value in values.items()], room)
    assert len(head) % 8 == 0 and len(head) >= room and (room < 400 or len(head) == room)
    (tmp_path / "x").write_bytes(head + b"".join(bytes(raw_bytes(value)) for value in values.values()))
    loaded = load_file(tmp_path / "x")
    assert all(torch.equal(loaded[key], value) for key, value in values.items())


@pytest.mark.parametrize("key", ["a", "model.layers.127.mlp.experts.255.down_proj.weight", 'ρ."weight"', "\u2028" * 40])
@pytest.mark.parametrize("count", [1, 3, 700])
def test_the_room_of_keys_holds_the_longest_header_that_they_can_have(key: str, count: int) -> None:
    keys = [f"{key}{number}" for number in range(count)]
    shapes = [(10**6, 10**5), (10**4, 10**4, 10), (), (1,)]
    entries = [Entry(k, "F8_E4M3", shapes[n % 4], 10**11 // count) for n, k in enumerate(keys)]
    assert len(header_of(entries)) <= header_room(keys)


def test_rows_that_come_apart_are_the_tensors_bytes() -> None:
    whole = torch.arange(20, dtype=torch.bfloat16).view(5, 4)
    rows = Rows(whole.dtype, (5, 4), (whole[:2], whole[2:]))
    assert entry_of("x", rows) == entry_of("x", whole) == Entry("x", "BF16", (5, 4), 40)
    assert b"".join(chunks_of(rows)) == b"".join(chunks_of(whole)) == bytes(raw_bytes(whole))


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


@pytest.mark.parametrize("shape", [(1, 1), (10,), (7, 3), (5, 2, 2), (3, 50)])
def test_slabs_are_all_rows_once_and_small(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SLAB_NUMEL", 12)
    width = torch.empty(shape)[0].numel()
    parts = list(slabs(shape))
    assert [row for start, stop in parts for row in range(start, stop)] == list(range(shape[0]))
    assert all((stop - start) * width <= max(12, width) for start, stop in parts)


def test_a_number_without_dimensions_is_a_row_and_an_empty_tensor_has_none() -> None:
    assert list(slabs(())) == [(0, 1)]
    assert list(slabs((0, 4))) == []
    assert list(slabs((2, 0))) == [(0, 2)]
