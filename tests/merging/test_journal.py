"""Half-done work: a note says what its writer knew or nothing, and pieces are trusted only when they are whole."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymerge.bundle.files import Piece
from polymerge.bundle.place import publish
from polymerge.bundle.stats import StatsLine
from polymerge.errors import OutputExistsError
from polymerge.merging.journal import Note, PieceWriter, Staging, half_done

RATIO = float(np.float32(1.0028))
NOTE = Note(
    pieces=(
        Piece(None, "a.weight", "BF16", (2, 3), 12, "parts/000000/0.bin", "ab"),
        Piece("math", "a.lora_A.weight", "F32", (), 4, "parts/000000/1.bin", "cd"),
    ),
    digests={"math": "12", "code": "34"},
    scales={"math": RATIO, "code": 1 / 3},
    stats=(
        StatsLine("a.weight", "math", "a", (2, 3), 1, "low_rank", 2.5, 0.1, RATIO, 1e-300, 1 - 1e-16, 0.2, 0.0123),
        StatsLine("a.weight", "code", "a", (2, 3), 0, "average", 2.5, 0.1, 1.0, 0.0, 1.0, math.pi, None),
    ),
)


def test_a_note_comes_back_to_the_last_bit() -> None:
    again = Note.from_json(NOTE.to_json().encode())
    assert again == NOTE
    assert type(again.stats[0].shape) is tuple and type(again.pieces[1].shape) is tuple
    assert Note.from_json(Note((), {}, {}, ()).to_json().encode()) == Note((), {}, {}, ())


@pytest.mark.parametrize("seed", range(5))
def test_any_float_comes_back_to_the_last_bit(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**63, 200, dtype=np.uint64)
    numbers = [float(x) for x in bits.view(np.float64) if math.isfinite(x)]
    note = Note((), {}, {str(i): x for i, x in enumerate(numbers)}, ())
    assert list(Note.from_json(note.to_json().encode()).scales.values()) == numbers


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another kind": lambda note: [],
    "no pieces": lambda note: {key: value for key, value in note.items() if key != "pieces"},
    "pieces are no list": lambda note: note | {"pieces": {}},
    "a piece lacks its hash's key": lambda note: note | {"pieces": [{"owner": None, "key": "x"}]},
    "a size in words": lambda note: note | {"pieces": [note["pieces"][0] | {"bytes": "12"}]},
    "a shape of text": lambda note: note | {"pieces": [note["pieces"][0] | {"shape": ["2"]}]},
    "no stats": lambda note: {key: value for key, value in note.items() if key != "stats"},
    "a line of the statistics is short": lambda note: note | {"stats": [{"tensor": "x"}]},
    "a scale in words": lambda note: note | {"scales": {"math": "1.0"}},
    "a scale of nothing": lambda note: note | {"scales": {"math": None}},
    "digests are a list": lambda note: note | {"digests": ["12"]},
}


@pytest.mark.parametrize("row", DAMAGE)
def test_a_damaged_note_is_no_note(row: str) -> None:
    data = DAMAGE[row](json.loads(NOTE.to_json()))
    with pytest.raises(ValueError):
        Note.from_json(json.dumps(data).encode())


def test_a_note_that_is_cut_off_anywhere_is_no_note() -> None:
    text = NOTE.to_json().encode()
    for length in range(len(text)):
        with pytest.raises(ValueError):
            Note.from_json(text[:length])


def staged(tmp_path: Path, *, resume: bool = False, fingerprint: dict[str, Any] | None = None) -> Staging:
    return Staging(tmp_path / "out.partial", fingerprint or {"recipe": 1}, resume=resume, kind="merge")


def finish(staging: Staging, index: int, value: float) -> Note:
    with staging.tensor(index) as writer:
        writer.emit(None, "x", torch.full((2, 3), value))
        writer.emit("math", "x", torch.tensor(value, dtype=torch.bfloat16))
        note = writer.note({"math": "12"}, {"math": value}, NOTE.stats)
    return staging.finish(index, note)


def test_what_is_finished_is_found_again_by_a_resumed_run(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    assert staging.finished(3) is None
    note = finish(staging, 3, 1.5)
    again = staged(tmp_path, resume=True)
    assert again.finished(3) == note and again.finished(2) is None
    base, weights = note.pieces
    assert (base.owner, base.key, base.dtype, base.shape, base.bytes) == (None, "x", "F32", (2, 3), 24)
    assert (weights.owner, weights.dtype, weights.shape, weights.bytes) == ("math", "BF16", (), 2)
    assert b"".join(again.content(base)) == torch.full((2, 3), 1.5).numpy().tobytes()
    assert hashlib.sha256(b"".join(again.content(base))).hexdigest() == base.sha256
    assert half_done(again.folder) > 26


def test_without_resuming_everything_is_done_again(tmp_path: Path) -> None:
    finish(staged(tmp_path), 0, 1.0)
    assert staged(tmp_path).finished(0) is None


def test_pieces_without_a_note_are_not_finished_and_are_cleared(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    with staging.tensor(0) as writer:
        for _ in range(3):
            writer.emit(None, "x", torch.zeros(4))
    assert staging.finished(0) is None
    note = finish(staging, 0, 1.0)
    assert len(list((staging.folder / "parts" / "000000").iterdir())) == len(note.pieces) == 2


@pytest.mark.parametrize("damage", ["changed", "cut off", "longer", "lost", "a folder"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_piece_that_is_not_whole_is_done_again(tmp_path: Path, damage: str, number: int) -> None:
    staging = staged(tmp_path)
    note = finish(staging, 0, 1.0)
    file = staging.folder / note.pieces[number].file
    data = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "lost":
        changed = {"changed": bytes([data[0] ^ 1]) + data[1:], "cut off": data[:-1], "longer": data + b"\0"}
        file.write_bytes(changed[damage])
    assert staged(tmp_path, resume=True).finished(0) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"pieces": 1}'])
def test_a_damaged_note_is_done_again(tmp_path: Path, text: str) -> None:
    staging = staged(tmp_path)
    finish(staging, 0, 1.0)
    (staging.folder / "parts" / "000000.json").write_text(text)
    assert staged(tmp_path, resume=True).finished(0) is None


def test_other_work_is_never_gone_on_with(tmp_path: Path) -> None:
    finish(staged(tmp_path), 0, 1.0)
    with pytest.raises(OutputExistsError, match="half-done work of another recipe"):
        staged(tmp_path, resume=True, fingerprint={"recipe": 2})
    assert staged(tmp_path, resume=True).finished(0) is not None


def test_pieces_that_were_written_elsewhere_are_taken(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "parts" / "7-abcd").mkdir(parents=True)
    writer = PieceWriter(elsewhere, elsewhere / "parts" / "7-abcd")
    writer.emit("math", "x", torch.arange(4))
    note = writer.note({}, {}, ())
    staging = staged(tmp_path)
    staging.take(7, note, {piece.file: (elsewhere / piece.file).read_bytes() for piece in note.pieces})
    assert staged(tmp_path, resume=True).finished(7) == note
    assert b"".join(staging.content(note.pieces[0])) == torch.arange(4).numpy().tobytes()


def test_zeros_lie_nowhere(tmp_path: Path) -> None:
    assert b"".join(staged(tmp_path).content(Piece("math", "x", "F32", (3,), 12))) == bytes(12)


def test_a_finished_merge_leaves_the_output_alone(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    finish(staging, 0, 1.0)
    (staging.folder / "bundle").mkdir()
    (staging.folder / "bundle" / "file").write_text("whole")
    publish(staging.folder / "bundle", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "whole"
    assert half_done(staging.folder) == 0
