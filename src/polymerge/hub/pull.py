"""A bundle of the model hub in a folder of its own, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.files import disk_errors
from ..bundle.hub import snapshot
from ..bundle.lock import writing
from ..bundle.manifest import MANIFEST
from ..bundle.place import begin_work, check_output, discard_work, mark_of, publish, restore, settled, work_folder
from ..bundle.verify import verify_files
from ..errors import BundleError
from ..sources.opening import HUB_ID

STAGED = "bundle"


def pull_bundle(repo: str, output: str | Path | None = None, *, overwrite: bool = False) -> Bundle:
    """Brings a bundle from the hub into a folder of its own, checks every hash, and moves it to its place.

    Args:
        repo: `org/name` or `org/name@revision`.
        output: by default a folder of the bundle's name, here. What an interrupted pull has brought is gone on with.

    Raises:
        BundleError: no hub id, not there, damaged on the way, or the hub cannot be reached.
        OutputExistsError, LockedError, DiskSpaceError: as for a merge.
    """
    name = repo.partition("@")[0]
    if not HUB_ID.fullmatch(name):
        raise BundleError(f"{repo}: not a hub id; write org/name, or org/name@revision")
    output = settled(output or name.partition("/")[2])
    check_output(output, overwrite=overwrite)
    work = work_folder(output)
    with disk_errors(output), writing(output):
        restore(output)
        if (mark_of(work) or {}).get("repo") != repo:
            begin_work(work, "pull", repo=repo)
        try:
            staged = snapshot(repo, work / STAGED)
        except BundleError:
            if not (work / STAGED / MANIFEST).exists():  # it comes first: nothing is here to go on with
                discard_work(work)
            raise
        shutil.rmtree(staged / ".cache", ignore_errors=True)
        result = verify_files(Bundle.open(staged), None)
        if not result.ok:
            raise BundleError(f"{repo}: {result.problems[0]}; pull it again")
        publish(staged, output)
        return Bundle.open(output)
