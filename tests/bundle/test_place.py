"""Folders that get to their place, and strangers' folders, which stay as they are."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from polymerge.bundle.place import (
    MARK,
    begin_work,
    check_output,
    discard_work,
    is_away,
    mark_of,
    publish,
    restore,
    settled,
    work_folder,
)
from polymerge.errors import DiskSpaceError, OutputExistsError
from tests.killed import assert_nothing_beside


def filled(folder: Path, text: str) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text(text)
    return folder


def text_of(folder: Path) -> str:
    return (folder / "inner" / "file").read_text()


def staged(out: Path, text: str) -> Path:
    return filled(begin_work(work_folder(out), "test") / "new", text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_a_bundle_or_an_empty_folder_may_be_overwritten(tmp_path: Path) -> None:
    check_output(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=True)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_output(tmp_path / "empty", overwrite=False)
    filled(tmp_path / "mine", "years of work")
    with pytest.raises(OutputExistsError, match="not a bundle"):
        check_output(tmp_path / "mine", overwrite=True)
    (tmp_path / "mine" / "polymerge.json").touch()
    check_output(tmp_path / "mine", overwrite=True)


def test_publishing_syncs_everything_before_the_first_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = staged(tmp_path / "out", "new")
    filled(tmp_path / "out", "old")
    steps: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        steps.append(("sync", str(Path(f"/proc/self/fd/{handle}").resolve().relative_to(tmp_path))))
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        steps.append(("rename", f"{self.relative_to(tmp_path)} to {Path(target).relative_to(tmp_path)}"))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    publish(new, tmp_path / "out")
    assert steps[:6] == [
        ("sync", "out.partial/new/inner/file"),
        ("sync", "out.partial/new/inner"),
        ("sync", "out.partial/new"),
        ("rename", "out to out.partial/previous"),
        ("rename", "out.partial/new to out"),
        ("sync", "."),
    ]
    assert text_of(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]


def test_a_first_publish_and_a_second_leave_one_folder(tmp_path: Path) -> None:
    for text in ("first", "second"):
        publish(staged(tmp_path / "out", text), tmp_path / "out")
        assert text_of(tmp_path / "out") == text
        assert names(tmp_path) == ["out"]


def test_only_what_has_lost_its_place_is_restored(tmp_path: Path) -> None:
    out = tmp_path / "out"
    restore(out)
    assert not names(tmp_path)
    work = begin_work(work_folder(out), "test")
    filled(work / "previous", "old")
    assert is_away(out)
    restore(out)
    assert text_of(out) == "old" and not is_away(out)
    assert_nothing_beside(out)
    work = begin_work(work_folder(out), "test")
    filled(work / "previous", "older")
    (work / "half-done").touch()
    restore(out)
    assert text_of(out) == "old" and names(work) == [MARK, "half-done"]


def test_the_last_copy_of_an_output_is_never_discarded(tmp_path: Path) -> None:
    for end in (discard_work, lambda work: begin_work(work, "test")):
        work = begin_work(work_folder(tmp_path / "out"), "test")
        filled(work / "previous", "old")
        end(work)
        assert text_of(tmp_path / "out") == "old"
        shutil.rmtree(tmp_path / "out")


def test_a_publish_that_cannot_sync_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = staged(tmp_path / "out", "new")
    filled(tmp_path / "out", "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskSpaceError):
        publish(new, tmp_path / "out")
    assert text_of(tmp_path / "out") == "old" and text_of(new) == "new"


def a_link(place: Path) -> None:
    begin_work(place.with_name("real"), "test")
    place.symlink_to(place.with_name("real"))


# What a user may have at the place of a work folder.
STRANGERS: dict[str, Callable[[Path], object]] = {
    "a folder": lambda place: filled(place, "mine"),
    "an empty folder": lambda place: place.mkdir(),
    "a bundle": lambda place: (filled(place, "mine") / "polymerge.json").write_text("{}"),
    "a file": lambda place: place.write_text("mine"),
    "a link to a folder with a mark": a_link,
    "a link to nowhere": lambda place: place.symlink_to("nowhere"),
    "a mark that is empty": lambda place: (filled(place, "mine") / MARK).touch(),
    "a mark that is a list": lambda place: (filled(place, "mine") / MARK).write_text("[]"),
    "a mark of another kind": lambda place: (filled(place, "mine") / MARK).write_text('{"polymerge": 1}'),
    "a mark that is a folder": lambda place: (filled(place, "mine") / MARK).mkdir(),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_has_no_mark_is_never_touched(tmp_path: Path, kind: str) -> None:
    out, place = tmp_path / "out", tmp_path / "out.partial"
    STRANGERS[kind](place)
    before = {path: path.lstat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    assert mark_of(place) is None
    for use in (
        lambda: check_output(out, overwrite=False),
        lambda: begin_work(place, "test"),
        lambda: discard_work(place),
    ):
        with pytest.raises(OutputExistsError, match=r"out\.partial: is in the way and was not made by polymerge"):
            use()
    restore(out)
    assert {path: path.lstat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_previous_is_a_name_like_any_other(tmp_path: Path) -> None:
    filled(tmp_path / "out.previous", "a backup")
    publish(staged(tmp_path / "out", "new"), tmp_path / "out")
    assert text_of(tmp_path / "out.previous") == "a backup" and names(tmp_path) == ["out", "out.previous"]


def test_what_a_killed_deletion_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = begin_work(tmp_path / "out.partial", "test")
    (work / "file").touch()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed before it
        discard_work(work)
    assert len(names(tmp_path)) == 1
    begin_work(work, "test")
    assert names(tmp_path) == ["out.partial"]


def test_a_link_is_followed_once_and_for_all(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "bundle")
    out = settled(tmp_path / "out")
    assert out == tmp_path / "disk" / "bundle"
    for text in ("first", "second"):
        publish(staged(settled(tmp_path / "out"), text), out)
        assert text_of(tmp_path / "out") == text and (tmp_path / "out").is_symlink()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OutputExistsError, match="circle"):
        settled(tmp_path / "circle")
