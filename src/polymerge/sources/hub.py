"""Whether the hub can be reached: without a network its library tries again for the better part of a minute. And who
wants to know that a download, which has bars of its own, comes next.

Knows an address; what is asked of the hub is `polymerge.sources.opening`'s and `outline`'s.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from urllib.parse import urlsplit
from urllib.request import getproxies

# So long a hub that does not answer is waited for.
REACH_SECONDS = 4.0

_BEFORE: ContextVar[Callable[[], None] | None] = ContextVar("before a download", default=None)


@contextmanager
def before_downloads(call: Callable[[], None]) -> Iterator[None]:
    """Inside, `call` is called before the hub's library is asked for files, where it would draw bars."""
    token = _BEFORE.set(call)
    try:
        yield
    finally:
        _BEFORE.reset(token)


def download_begins() -> None:
    """Whoever asks the hub for files says so first."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    call = _BEFORE.get()
    if call is not None and not are_progress_bars_disabled():
        call()


def hub_answers() -> bool:
    """Whether anything listens where the hub is, found out once."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _listens(constants.ENDPOINT)


@functools.cache
def _listens(url: str) -> bool:
    """Through a proxy it is taken to."""
    place = urlsplit(url)
    if getproxies().get(place.scheme):
        return True
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        with socket.create_connection((place.hostname or "", port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False
