"""Whether the hub can be reached: without a network its library tries again for the better part of a minute.

Knows an address; what is asked of the hub is `polymerge.sources.opening`'s and `outline`'s.
"""

from __future__ import annotations

import functools
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

# So long a hub that does not answer is waited for.
REACH_SECONDS = 4.0


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
