"""Files that no manifest lists and that are named by their content: the router's.

Knows names and bytes; does not know what is in a router (`polymerge.router.record`).
"""

from __future__ import annotations

import hashlib

# What a bundle's router is said in; it names the other files, which lie beside it.
ROUTER = "router/router.json"


def named_by_content(stem: str, suffix: str, data: bytes) -> str:
    return f"{stem}-{_digest(data)}{suffix}"


def has_content(name: str, data: bytes) -> bool:
    """Whether a file of this name has this content."""
    return _digest(data) in name


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
