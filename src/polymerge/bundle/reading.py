"""A bundle that stays one and the same while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BundleError
from .bundle import Bundle
from .lock import come_back
from .manifest import read_manifest


@contextmanager
def steady(bundle: Bundle) -> Iterator[None]:
    """What the block reads of the bundle is all of one state, the one that was opened; otherwise the block fails.

    Raises:
        BundleError: another process merged to the same folder, added or removed an expert meanwhile, or before.
    """
    try:
        yield
    except Exception:
        _check_same(bundle)
        raise
    _check_same(bundle)


def _check_same(bundle: Bundle) -> None:
    come_back(bundle.path)
    if read_manifest(bundle.path) != bundle.manifest:
        raise BundleError(f"{bundle.path}: was changed by another process while it was read; run again") from None
