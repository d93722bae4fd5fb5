"""The manifest's digest of itself: every file's hash stands in the manifest, and nothing else says that it is whole.

It lies among the versions of what wrote the bundle, which readers from before it pass over. Knows a manifest's JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "manifest"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's data with its digest."""
    return {**data, "versions": {**data["versions"], KEY: _digest(data)}}


def seal_holds(file: Path) -> bool | None:
    """Whether a manifest's digest is that of its content; None where it has none, as those of older versions."""
    data = json.loads(file.read_text("utf-8"))
    said = data["versions"].get(KEY)
    return None if said is None else bool(said == _digest(data))


def without_seal(versions: Mapping[str, str]) -> dict[str, str]:
    """A manifest's versions without its digest, which a change of the manifest would make wrong."""
    return {name: version for name, version in versions.items() if name != KEY}


def _digest(data: Mapping[str, Any]) -> str:
    """SHA-256 over all that a manifest says but this."""
    rest = {**data, "versions": without_seal(data["versions"])}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
