"""A file of tensors that grows: whole at its end, whatever was begun and stopped on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from polymerge.bundle.files import chunks_of, entry_of, header_room
from polymerge.bundle.growing import GrowingFile, Piece
from polymerge.errors import PolymergeError

VALUES = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(2.5, dtype=torch.bfloat16), "c": torch.zeros(0, 3)}
ROOM = header_room(VALUES)


def grown(path: Path, names: str = "bac", room: int = ROOM) -> GrowingFile:
    file = GrowingFile(path, "e", room)
    for name in names:
        add(file, name, VALUES[name])
    return file


def add(file: GrowingFile, name: str, value: Tensor) -> Piece:
    return file.append(entry_of(name, value), chunks_of(value))


def test_a_grown_file_is_one_that_the_library_opens(tmp_path: Path) -> None:
    file = grown(tmp_path / "deep" / "x")
    entry = file.finish([piece.entry._replace(key=f"model.{piece.key}") for piece in file.pieces])
    data = (tmp_path / "deep" / "x").read_bytes()
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert entry.bytes == ROOM + 26 == file.size
    loaded = load_file(tmp_path / "deep" / "x")
    assert {name: value.dtype for name, value in loaded.items()} == {f"model.{n}": v.dtype for n, v in VALUES.items()}
    assert all(torch.equal(loaded[f"model.{name}"], value) for name, value in VALUES.items())


def test_the_bytes_are_the_same_however_often_it_was_stopped(tmp_path: Path) -> None:
    whole = grown(tmp_path / "x")
    whole.finish()
    pieces = []
    for name in "bac":
        file = GrowingFile(tmp_path / "y", "e", ROOM)
        assert all(file.take(piece) for piece in pieces)

        def stopped() -> Iterator[bytes]:
            yield b"half"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            file.append(entry_of("other", torch.zeros(10)), stopped())
        pieces.append(add(file, name, VALUES[name]))
    file.finish()
    file = GrowingFile(tmp_path / "y", "e", ROOM)  # stopped after its end, too
    assert all(file.take(piece) for piece in pieces)
    with (tmp_path / "y").open("ab") as handle:
        handle.write(b"of a tensor that was begun")
    file.finish()
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("damage", ["changed", "cut off", "lost", "a folder"])
def test_only_what_is_whole_is_taken_up(tmp_path: Path, damage: str) -> None:
    pieces = grown(tmp_path / "x").pieces
    data = bytearray((tmp_path / "x").read_bytes())
    (tmp_path / "x").unlink()
    if damage == "a folder":
        (tmp_path / "x").mkdir()
    elif damage != "lost":
        data[-1] ^= 1
        (tmp_path / "x").write_bytes(data if damage == "changed" else data[:-1])
    again = GrowingFile(tmp_path / "x", "e", ROOM)
    taken = [again.take(piece) for piece in pieces[:2]]
    assert taken == ([True, False] if damage in ("changed", "cut off") else [False, False])
    assert again.pieces == pieces[: sum(taken)]


def test_a_tensor_that_changed_after_it_was_written_is_named_at_the_end(tmp_path: Path) -> None:
    file = grown(tmp_path / "x")
    with (tmp_path / "x").open("r+b") as handle:
        handle.seek(ROOM + 5)
        handle.write(b"\xff")
    with pytest.raises(PolymergeError, match=r"x: tensor 'b' is no longer what was written; run again with --resume"):
        file.finish()


def test_a_tensor_of_another_size_than_it_said_is_refused(tmp_path: Path) -> None:
    file = grown(tmp_path / "x")
    with pytest.raises(PolymergeError, match="tensor 'd' has 3 bytes, expected 4"):
        file.append(entry_of("d", torch.zeros(1)), [b"123"])
    file.finish()
    assert load_file(tmp_path / "x").keys() == VALUES.keys()


def test_a_header_that_needs_more_than_its_room_gets_it(tmp_path: Path) -> None:
    entry = grown(tmp_path / "x", room=16).finish()
    data = (tmp_path / "x").read_bytes()
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert all(torch.equal(value, VALUES[name]) for name, value in load_file(tmp_path / "x").items())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_without_tensors_is_a_file(tmp_path: Path) -> None:
    assert grown(tmp_path / "x", "").finish().bytes == (tmp_path / "x").stat().st_size
    assert load_file(tmp_path / "x") == {}
