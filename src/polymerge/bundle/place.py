"""How a folder gets to its place: made whole beside it, then moved there by renaming, and nothing that is a stranger's
is touched on the way.

What is half-done lies in a *work folder* that carries polymerge's mark, the small file `.polymerge`, from the moment it
is there. Only folders with the mark are ever cleared, and they leave by a scratch name, so that a kill in the middle
leaves none without. Knows folders, marks and renames; not what lies in them, nor who may write
(`polymerge.bundle.lock`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OutputExistsError
from ..paths import path_of
from .files import disk_errors, scratch_name, scratches_of
from .manifest import MANIFEST

MARK = ".polymerge"
MARK_VERSION = 1
WORK = ".partial"


def settled(output: str | Path, what: str = "output") -> Path:
    """Where an output really lies: a link is followed here, once, and nowhere later.

    Raises:
        OutputExistsError: no folder or file can be made there.
    """
    output = path_of(output, what)
    check_name(output)
    if not output.is_symlink():
        return output
    try:
        return output.resolve()
    except (OSError, RuntimeError):
        raise OutputExistsError(f"{output}: is a link that leads in a circle; give another --output") from None


def check_name(output: Path) -> None:
    """Raises OutputExistsError unless a folder could be made at `output`, were nothing there."""
    if not output.name or output.name == "..":
        raise OutputExistsError(f"{output}: not the name of a folder to make; give one, such as ./bundle")
    blocking = next((parent for parent in output.parents if parent.exists() and not parent.is_dir()), None)
    if blocking:
        raise OutputExistsError(f"{output}: {blocking} is a file, so no folder can be made in it")
    # somebody's own file may have the manifest's name; a bundle is a checkpoint, too
    there = (parent for parent in output.absolute().parents if (parent / MANIFEST).is_file())
    bundle = next((parent for parent in there if (parent / "config.json").is_file()), None)
    if bundle:
        raise OutputExistsError(
            f"{output}: lies in the bundle {bundle}, which would be whole no more; choose another place"
        )


def file_to_write(path: str | Path, what: str = "output") -> Path:
    """Where a file of results goes; asked before the work whose results they are.

    Raises:
        OutputExistsError: no file can be written there: a folder or somebody's own file is there, or a file in the
            place of its folder, it may not be written to, or a bundle's folder is all around.
    """
    path = settled(path, what)
    if path.is_dir():
        raise OutputExistsError(f"{path}: is a folder; name a file to write, such as {path / 'results'}")
    _check_writable(path)
    if path.is_file() and not _earlier(path):
        raise OutputExistsError(f"{path}: exists, and holds no earlier results; it is never overwritten")
    return path


def _earlier(file: Path) -> bool:
    """Whether a file begins as pages and indented JSON do, or is empty."""
    with file.open("rb") as handle:
        beginning = handle.read(15)
    return not beginning or beginning.startswith(b"{\n") or beginning.lower() == b"<!doctype html>"


def folder_to_fill(path: str | Path, what: str = "output") -> Path:
    """The same of a folder that files of results go into, which may be there."""
    path = path_of(path, what)
    check_name((path if path.name else path.absolute()) / "results")
    _check_writable(path / "results")
    return path


def _check_writable(path: Path) -> None:
    there = next(parent for parent in path.absolute().parents if parent.is_dir())
    if not os.access(there, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputExistsError(f"{path}: may not be written to; choose another place")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError unless a bundle may be written to `output`."""
    check_name(output)
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output}: exists; give --overwrite to replace it, or another --output")
    if output.exists() and not _is_bundle(output):
        raise OutputExistsError(f"{output}: exists and is not a bundle; it is never overwritten")
    check_own(work_folder(output))


def work_folder(output: Path) -> Path:
    """Where an output is half-done. While it is moved, what it replaces lies there too."""
    return output.with_name(output.name + WORK)


def begin_work(folder: Path, kind: str, **about: Any) -> Path:
    """An empty work folder with its mark, in the place of whatever an interrupted run left there.

    Raises:
        OutputExistsError: a folder or file without the mark is there.
    """
    discard_work(folder)
    scratch = folder.with_name(scratch_name(folder))
    with disk_errors(folder):
        scratch.mkdir(parents=True)
        try:
            _write_mark(scratch / MARK, {"polymerge": kind, "version": MARK_VERSION, **about})
            scratch.rename(folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return folder


def discard_work(folder: Path) -> None:
    """Deletes a work folder, and what an interrupted deletion left. Raises OutputExistsError for a stranger's."""
    check_own(folder)
    restore(folder.with_name(folder.name.removesuffix(WORK)))  # never with the last copy of an output in it
    if folder.exists():
        _delete(folder)
    _clear_scratches(folder)


def check_own(folder: Path) -> None:
    """Raises OutputExistsError where something is at a work folder's place that polymerge did not make."""
    if os.path.lexists(folder) and mark_of(folder) is None:
        raise OutputExistsError(
            f"{folder}: is in the way and was not made by polymerge (it has no {MARK}), so it is not touched; "
            "move it away, or choose another --output"
        )


def mark_of(folder: Path) -> Mapping[str, Any] | None:
    """What a work folder's mark says; None for any other folder, a file, or a link."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) and isinstance(mark.get("polymerge"), str) else None


def publish(assembled: Path, output: Path) -> Path:
    """Moves a whole folder out of the output's work folder to its place, and ends the work.

    Killed anywhere, it leaves the old folder or the new one at the output, or, between the two renames, the old one in
    the work folder, from where `restore` brings it back.
    """
    work = work_folder(output)
    with disk_errors(output):
        sync_tree(assembled)
    if output.exists():
        output.rename(_previous(work))
    assembled.rename(output)
    sync_folder(output.parent)
    discard_work(work)
    return output


def restore(output: Path) -> None:
    """Undoes a `publish` that was killed between its two renames, and ends one that was killed after them. A work
    folder that holds nothing any more goes. To be asked by the output's only writer."""
    work = work_folder(output)
    if mark_of(work) is not None:
        previous = _previous(work)
        if previous.exists() and output.exists():
            _delete(previous)
        elif previous.exists():
            previous.rename(output)
        if [path.name for path in work.iterdir()] == [MARK]:
            _delete(work)
    _clear_scratches(work)


def _clear_scratches(folder: Path) -> None:
    """What a run that was killed had begun to make of a work folder, or to delete."""
    for left in scratches_of(folder):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() and not left.is_symlink() else left.unlink()


def is_away(output: Path) -> bool:
    """Whether a `publish` that was killed, or that is at work this moment, has the output's folder."""
    return not output.exists() and _previous(work_folder(output)).exists()


def sync_tree(folder: Path) -> None:
    """Returns when all files in the folder and the folders themselves are on the disk, the innermost first."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def sync_folder(folder: Path) -> None:
    """Returns when the folder's entries are on the disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_mark(file: Path, mark: Mapping[str, Any]) -> None:
    with file.open("x", encoding="utf-8") as handle:
        handle.write(json.dumps(mark) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def _delete(folder: Path) -> None:
    """A kill in the middle leaves a scratch folder, which the next run finds by its name."""
    scratch = folder.with_name(scratch_name(folder))
    folder.rename(scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def _previous(work: Path) -> Path:
    return work / "previous"


def _is_bundle(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MANIFEST).exists() or not any(folder.iterdir()))
