"""One expert comes to a bundle or leaves it, by one process at a time, and a kill leaves the bundle before or after.

The manifest says what the bundle holds: the change is done at the moment when it is written. A work folder in the
bundle notes, from before the first file to after the last, which expert's folder comes or goes; whoever writes to the
bundle next ends what was not ended. Knows folders and the manifest's list of experts; nothing of tensors.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.files import disk_errors, scratches_of
from ..bundle.lock import writing
from ..bundle.manifest import MANIFEST, STATS
from ..bundle.place import begin_work, discard_work, mark_of, sync_folder, sync_tree
from ..errors import BundleError
from ..naming import EXPERT_NAME
from .inheritance import discard_unlisted

# Not beside the bundle, which may be a file system of its own; not among the experts, whose names it could be.
CHANGE = ".polymerge-change"


@contextmanager
def alone_with(path: Path) -> Iterator[Bundle]:
    """The bundle as it is now, changed by nobody else in the block, and rid of what a killed change left.

    Raises:
        LockedError: another process is writing to it.
    """
    with disk_errors(path), writing(path):
        bundle = Bundle.open(path)
        _end(bundle)
        for file in (MANIFEST, STATS):
            for left in scratches_of(path / file):
                left.unlink()
        yield bundle


@contextmanager
def changing(bundle: Bundle, name: str) -> Iterator[Path]:
    """Within the block, which gets an empty work folder, the expert comes or goes. Until the manifest lists it, its
    folder is not the bundle's: however the block ends, it stays if the manifest lists it and goes otherwise.

    Raises:
        BundleError: a folder of that name is there that is not the bundle's, or one that is a link.
    """
    folder = _folder(bundle, name)
    if name not in bundle.experts and os.path.lexists(folder):
        raise BundleError(f"{folder}: is there, but is no expert of this bundle's manifest; move it away")
    work = begin_work(bundle.path / CHANGE, "change", expert=name)
    try:
        yield work
    finally:
        _end(Bundle.open(bundle.path))


def move_in(assembled: Path, bundle: Bundle, name: str) -> None:
    """Moves the expert's folder out of the work folder to its place."""
    folder = _folder(bundle, name)
    sync_tree(assembled)
    folder.parent.mkdir(exist_ok=True)
    (assembled / "experts" / name).rename(folder)
    sync_folder(folder.parent)


def _end(bundle: Bundle) -> None:
    work = bundle.path / CHANGE
    name = (mark_of(work) or {}).get("expert")
    if isinstance(name, str) and EXPERT_NAME.fullmatch(name) and name not in bundle.experts:
        folder = _folder(bundle, name)
        if folder.exists():
            shutil.rmtree(folder)
    discard_unlisted(bundle)
    discard_work(work)


def _folder(bundle: Bundle, name: str) -> Path:
    folder = bundle.path / "experts" / name
    for place in (folder, folder.parent):
        if place.is_symlink():
            raise BundleError(f"{place}: is a link; experts come and go in the bundle's own folder only")
    return folder
