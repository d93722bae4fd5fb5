"""One writer at a time: a lock beside what is written, `.NAME.polymerge.lock`, which the system takes back when its
process dies. And readers that notice when a writer was at work under them.

Writers hold the lock from their first look at the output to the end. Readers take it only where a writer has the folder
out of its place for a moment; otherwise they read without, any number at once, also where nobody may write, and look at
the end whether the manifest is still the one that they began with.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import LockedError
from .place import is_away, restore

logger = logging.getLogger(__name__)

# How long what is short waits for what may be short too.
PATIENCE = 10.0


@contextmanager
def writing(output: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Within the block no other process writes to `output`.

    Args:
        patience: seconds to wait for another process.

    Raises:
        LockedError: another process is at it, no lock can be made there, or it is the hub's cache.
    """
    place = output.resolve()
    if any(parent.name == "snapshots" and (parent.parent / "blobs").is_dir() for parent in place.parents):
        raise LockedError(
            f"{output}: is the hub's cache, which is only read; `polymerge pull` makes a folder of your own"
        )
    file = place.parent / f".{place.name}.polymerge.lock"
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, output, patience)
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = getattr(error, "strerror", None) or error
        raise LockedError(f"{file}: no lock can be made here ({reason}), so nothing is written") from None
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, output: Path, patience: float) -> None:
    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        busy = f"{output}: another polymerge process is writing to it"
    if patience:
        logger.warning("%s; waiting for up to %.0f seconds", busy, patience)
        try:
            lock.acquire(timeout=patience)
            return
        except Timeout:
            pass
    raise LockedError(f"{busy}; run again when it is done, or choose another output")


def come_back(place: Path) -> None:
    """Returns when an output that a writer has out of its place is there again, or was never there.

    Raises:
        LockedError: the writer takes its time.
    """
    try:
        output = place.resolve()
    except (OSError, RuntimeError, ValueError):  # no path at all, which others say better
        return
    if is_away(output):
        with writing(output, patience=PATIENCE):
            restore(output)
