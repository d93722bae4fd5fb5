"""Whether the hub can be reached: without a network its library tries again for the better part of a minute. And who
wants to know that a download, which has bars of its own, comes next.

Knows an address; what is asked of the hub is `polymerge.sources.opening`'s and `outline`'s.
"""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit
from urllib.request import getproxies

# So long a hub that does not answer is waited for, its name's resolution and all its addresses together.
REACH_SECONDS = 3.0

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
    # in a thread: nothing bounds a resolver's time, and a firewall that drops packets costs its own for each address
    answers: SimpleQueue[bool] = SimpleQueue()
    threading.Thread(target=_ask_all, args=(place.hostname or "", port, answers), daemon=True).start()
    try:
        return answers.get(timeout=REACH_SECONDS)
    except Empty:
        return False


def _ask_all(host: str, port: int, answers: SimpleQueue[bool]) -> None:
    """Asks all addresses of a host at once. Puts True as soon as one listens, False when none does."""
    asked = []
    with suppress(OSError, UnicodeError):
        for address in {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}:
            asked.append(threading.Thread(target=_ask, args=(address, port, answers), daemon=True))
            asked[-1].start()
    for thread in asked:
        thread.join()
    answers.put(False)


def _ask(address: str, port: int, answers: SimpleQueue[bool]) -> None:
    with suppress(OSError), socket.create_connection((address, port), timeout=REACH_SECONDS):
        answers.put(True)
