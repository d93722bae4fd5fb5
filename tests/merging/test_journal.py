"""Half-done work: a note says what its writer knew or nothing, and tensors are trusted only when they are whole."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymerge.bundle.files import Rows
from polymerge.bundle.growing import Piece
from polymerge.bundle.place import publish
from polymerge.bundle.stats import StatsLine
from polymerge.errors import OutputExistsError
from polymerge.merging.compress import Emit, TensorReport
from polymerge.merging.journal import Note, Staging, begin, end_published, half_done
from polymerge.merging.layout import Layout

RATIO = float(np.float32(1.0028))
NOTE = Note(
    number=0,
    pieces=(
        Piece(None, "a.weight", "BF16", (2, 3), 12, "ab"),
        Piece("math", "a.lora_A.weight", "F32", (), 4, "cd"),
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
    assert Note.from_json(Note(0, (), {}, {}, ()).to_json().encode()) == Note(0, (), {}, {}, ())


@pytest.mark.parametrize("seed", range(5))
def test_any_float_comes_back_to_the_last_bit(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**63, 200, dtype=np.uint64)
    numbers = [float(x) for x in bits.view(np.float64) if math.isfinite(x)]
    note = Note(0, (), {}, {str(i): x for i, x in enumerate(numbers)}, ())
    assert list(Note.from_json(note.to_json().encode()).scales.values()) == numbers


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another kind": lambda note: [],
    "no pieces": lambda note: {key: value for key, value in note.items() if key != "pieces"},
    "pieces are no list": lambda note: note | {"pieces": {}},
    "a piece lacks its hash's key": lambda note: note | {"pieces": [{"owner": None, "key": "x"}]},
    "a size in words": lambda note: note | {"pieces": [note["pieces"][0] | {"bytes": "12"}]},
    "a shape of text": lambda note: note | {"pieces": [note["pieces"][0] | {"shape": ["2"]}]},
    "no number": lambda note: {key: value for key, value in note.items() if key != "number"},
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


LAYOUT = Layout(
    base={name: f"model-{number}" for number, name in enumerate("xyz")},
    experts={"math": "experts/math/file", "code": "experts/code/file"},
    rooms={**{f"model-{n}": 200 for n in range(3)}, "experts/math/file": 304, "experts/code/file": 304},
)


def staged(tmp_path: Path, *, resume: bool = False, fingerprint: dict[str, Any] | None = None) -> Staging:
    begin(tmp_path / "out.partial", fingerprint or {"recipe": 1}, resume=resume)
    return Staging(tmp_path / "out.partial", LAYOUT)


def finish(staging: Staging, name: str, value: float) -> Note:
    def work(emit: Emit) -> TensorReport:
        emit(None, name, torch.full((2, 3), value))
        emit("math", name, Rows(torch.bfloat16, (2,), (torch.tensor([value], dtype=torch.bfloat16),) * 2))
        return TensorReport({"math": "12"}, {"math": value}, list(NOTE.stats))

    return staging.finish(work)


def fail(staging: Staging, name: str) -> None:
    def work(emit: Emit) -> TensorReport:
        emit("math", name, torch.zeros(7))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        staging.finish(work)


def finished(staging: Staging) -> dict[str, bytes]:
    """The files at their ends."""
    for file in staging.files.values():
        file.finish()
    return {name: (staging.bundle / name).read_bytes() for name in staging.files}


def test_what_is_finished_is_gone_on_with_by_a_resumed_run(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    assert staging.notes == []
    notes = [finish(staging, "x", 1.5), finish(staging, "y", 2.5)]
    fail(staging, "z")
    again = staged(tmp_path, resume=True)
    assert again.notes == notes
    base, own = notes[0].pieces
    assert (base.owner, base.key, base.dtype, base.shape, base.bytes) == (None, "x", "F32", (2, 3), 24)
    assert (own.owner, own.dtype, own.shape, own.bytes) == ("math", "BF16", (2,), 4)
    assert base.sha256 == hashlib.sha256(torch.full((2, 3), 1.5).numpy().tobytes()).hexdigest()
    finish(again, "z", 3.5)
    whole = staged(tmp_path / "undisturbed")
    for name, value in (("x", 1.5), ("y", 2.5), ("z", 3.5)):
        finish(whole, name, value)
    assert finished(again) == finished(whole)
    assert half_done(tmp_path / "out.partial") > 3 * 28


def test_without_resuming_everything_is_done_again(tmp_path: Path) -> None:
    finish(staged(tmp_path), "x", 1.0)
    assert staged(tmp_path).notes == []


def damaged(file: Path, damage: str, at: int) -> None:
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "lost":
        data[at] ^= 1
        file.write_bytes(data if damage == "changed" else data[:at])


@pytest.mark.parametrize("damage", ["changed", "cut off", "lost", "a folder"])
@pytest.mark.parametrize("file", ["model-1", "experts/math/file"])
def test_from_the_first_tensor_that_is_not_whole_all_is_done_again(tmp_path: Path, damage: str, file: str) -> None:
    staging = staged(tmp_path)
    for name, value in (("x", 1.5), ("y", 2.5), ("z", 3.5)):
        finish(staging, name, value)
    damaged(staging.bundle / file, damage, 205 if file == "model-1" else 309)  # of the second tensor
    again = staged(tmp_path, resume=True)
    left = 0 if file != "model-1" and damage in ("lost", "a folder") else 1
    assert again.notes == staging.notes[:left]
    assert len((tmp_path / "out.partial" / "journal.jsonl").read_bytes().splitlines()) == left
    for name, value in (("x", 1.5), ("y", 2.5), ("z", 3.5)):
        if name not in [note.pieces[0].key for note in again.notes]:
            finish(again, name, value)
    expected = finished(again)
    assert staged(tmp_path, resume=True).notes == again.notes
    whole = staged(tmp_path / "undisturbed")
    for name, value in (("x", 1.5), ("y", 2.5), ("z", 3.5)):
        finish(whole, name, value)
    assert expected == finished(whole)


@pytest.mark.parametrize("line", [b"", b"[]\n", b"null\n", b"{\n", b'{"pieces": 1}\n', b"\xff\n", b"cut off"])
def test_a_damaged_line_ends_what_is_known(tmp_path: Path, line: bytes) -> None:
    staging = staged(tmp_path)
    notes = [finish(staging, name, 1.0) for name in "xyz"]
    journal = tmp_path / "out.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:-9] if line == b"cut off" else line
    journal.write_bytes(b"".join(lines))
    assert staged(tmp_path, resume=True).notes == notes[:1]
    assert journal.read_bytes() == lines[0]


def test_a_note_of_no_file_of_the_bundle_is_no_note(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    note = finish(staging, "x", 1.0)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    for owner, key in (("../../outside", "x"), (None, "of no shard")):
        other = replace(note, pieces=(note.pieces[0], replace(note.pieces[1], owner=owner, key=key)))
        journal.write_text(other.to_json() + "\n")
        again = staged(tmp_path, resume=True)
        assert again.notes == [] and not any(file.pieces for file in again.files.values())


def test_other_work_is_never_gone_on_with(tmp_path: Path) -> None:
    finish(staged(tmp_path), "x", 1.0)
    with pytest.raises(OutputExistsError, match="half-done work of another recipe"):
        staged(tmp_path, resume=True, fingerprint={"recipe": 2})
    assert len(staged(tmp_path, resume=True).notes) == 1


def test_what_lies_beside_the_tensors_of_a_stopped_run_goes(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    notes = [finish(staging, "x", 1.0)]
    for name in ("config.json", "experts/math/persona/.0123456789ab-0123456789ab.polymerge", "experts/math/x"):
        (staging.bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (staging.bundle / name).write_text("of a run that was stopped at its end")
    again = staged(tmp_path, resume=True)
    assert again.notes == notes
    assert {str(path.relative_to(again.bundle)) for path in again.bundle.rglob("*")} == {
        "model-0",
        "experts",
        "experts/math",
        "experts/math/file",
    }


def test_a_published_merge_leaves_the_output_alone(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    finish(staging, "x", 1.0)
    end_published(tmp_path / "out.partial")
    assert staging.bundle.exists()  # it was not yet
    shutil.copytree(tmp_path / "out.partial", tmp_path / "killed.partial")
    publish(staging.bundle, tmp_path / "out")
    (tmp_path / "killed.partial" / "bundle").rename(tmp_path / "killed")  # and killed before the end
    end_published(tmp_path / "killed.partial")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "out"]
    assert half_done(tmp_path / "out.partial") == 0
