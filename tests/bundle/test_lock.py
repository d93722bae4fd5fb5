"""One writer at a time, and readers that notice one."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

import polymerge.bundle.lock as lock_module
from polymerge import Bundle
from polymerge.bundle.lock import come_back, writing
from polymerge.bundle.place import begin_work, work_folder
from polymerge.bundle.reading import steady
from polymerge.errors import BundleError, LockedError, SourceError
from tests.conftest import Merged


def test_the_second_writer_is_refused_at_once_and_the_next_is_not(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with writing(out):
        began = time.monotonic()
        with pytest.raises(LockedError, match=r"out: another polymerge process is writing to it"), writing(out):
            raise AssertionError
        assert time.monotonic() - began < 2
        with writing(out.with_name("other")):
            pass
    with writing(out):
        pass


def test_a_writer_by_another_name_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with writing(tmp_path / "real"), pytest.raises(LockedError), writing(tmp_path / "link"):
        raise AssertionError
    with writing(tmp_path / "real" / "out"), pytest.raises(LockedError), writing(tmp_path / "link" / "out"):
        raise AssertionError


def test_the_lock_goes_with_an_error_and_writes_nothing_into_its_file(tmp_path: Path) -> None:
    decoy = tmp_path / ".out.polymerge.lock"
    decoy.write_text("mine")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "out"):
        raise ZeroDivisionError
    with writing(tmp_path / "out"):
        pass
    assert decoy.read_text() == "mine"


def test_where_no_lock_can_be_made_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / ".out.polymerge.lock").mkdir()
    with pytest.raises(LockedError, match="no lock can be made here"), writing(tmp_path / "out"):
        raise AssertionError


def test_who_is_patient_waits(tmp_path: Path) -> None:
    with writing(tmp_path / "out"):
        timer = threading.Timer(0.3, lambda: None)
        timer.start()
        with pytest.raises(LockedError), writing(tmp_path / "out", patience=0.2):
            raise AssertionError
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with writing(tmp_path / "out"):
            held.set()
            free.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    threading.Timer(0.3, free.set).start()
    with writing(tmp_path / "out", patience=30):
        assert free.is_set()
    holder.join()


@pytest.fixture
def bundle(merged: Merged, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged("llama", compress_rate=0.6)[0].path, tmp_path / "bundle"))


def taken_away(bundle: Path) -> None:
    """As a writer has it between its two renames."""
    bundle.rename(begin_work(work_folder(bundle), "merge") / "previous")


def test_a_reader_brings_back_what_a_killed_writer_had_out_of_its_place(bundle: Path) -> None:
    before = Bundle.open(bundle).manifest
    taken_away(bundle)
    assert Bundle.open(bundle).manifest == before
    assert bundle.is_dir()


def test_a_reader_waits_for_a_writer_that_lives_and_then_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lock_module, "PATIENCE", 0.2)
    come_back(tmp_path / "never")  # what is not there is nobody's
    taken_away(bundle)
    with writing(bundle), pytest.raises(LockedError, match="another polymerge process"):
        Bundle.open(bundle)
    assert not bundle.exists()


def test_reading_takes_no_lock(bundle: Path) -> None:
    with writing(bundle), steady(Bundle.open(bundle)), steady(Bundle.open(bundle)):
        pass


def test_what_changed_while_it_was_read_is_refused_whatever_else_went_wrong(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(SourceError, match="something"), steady(opened):
        raise SourceError("something")
    text = (bundle / "polymerge.json").read_text()
    for error in (None, SourceError("a file is missing")):
        with pytest.raises(BundleError, match="was changed by another process while it was read"), steady(opened):
            (bundle / "polymerge.json").write_text(text.replace('"seed": 0', '"seed": 1'))
            if error:
                raise error
        (bundle / "polymerge.json").write_text(text)
