"""Digests of the two files that no other names: a bundle's manifest and its router's record hold their own.

The manifest's lies among the versions of what wrote the bundle, which readers from before it pass over; the router's is
a key of its own. Knows their JSON; does not know what stands in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "manifest"
# Of router.json.
ROUTER_KEY = "digest"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's data with its digest."""
    return {**data, "versions": {**data["versions"], KEY: _digest(data)}}


def seal_holds(file: Path) -> bool | None:
    """Whether a manifest's digest is that of its content; None where it has none, as those of older versions."""
    data = json.loads(file.read_text("utf-8"))
    said = data["versions"].get(KEY)
    return None if said is None else bool(said == _digest(data))


def router_digest(data: Mapping[str, Any]) -> str:
    """Of all that a router's record says but its digest."""
    return _sha256({name: value for name, value in data.items() if name != ROUTER_KEY})


def router_seal_holds(data: Mapping[str, Any]) -> bool:
    """Whether a router's digest is that of its record. One of before it was noted has none, and holds."""
    said = data.get(ROUTER_KEY)
    return said is None or bool(said == router_digest(data))


def without_seal(versions: Mapping[str, str]) -> dict[str, str]:
    """A manifest's versions without its digest, which a change of the manifest would make wrong."""
    return {name: version for name, version in versions.items() if name != KEY}


def _digest(data: Mapping[str, Any]) -> str:
    """Of all that a manifest says but its digest."""
    return _sha256({**data, "versions": without_seal(data["versions"])})


def _sha256(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
