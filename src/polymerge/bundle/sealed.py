"""The manifest's digest of itself: every file's hash stands in the manifest, and nothing else says that it is whole.

It lies among the versions of what wrote the bundle, which readers from before it pass over. Knows a manifest's JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

KEY = "manifest"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's data with its digest."""
    return {**data, "versions": {**data["versions"], KEY: _digest(data)}}


def is_sealed(file: Path) -> bool:
    """Whether a manifest has a digest; those of older versions have none."""
    return KEY in json.loads(file.read_text("utf-8"))["versions"]


def seal_problems(file: Path) -> Iterator[str]:
    """Where a manifest's digest is not that of its content."""
    data = json.loads(file.read_text("utf-8"))
    if data["versions"].get(KEY, _digest(data)) != _digest(data):
        yield f"{file.name}: was changed by hand or damaged: it has another digest than it says"


def without_seal(versions: Mapping[str, str]) -> dict[str, str]:
    """A manifest's versions without its digest, which a change of the manifest would make wrong."""
    return {name: version for name, version in versions.items() if name != KEY}


def _digest(data: Mapping[str, Any]) -> str:
    """SHA-256 over all that a manifest says but this."""
    rest = {**data, "versions": without_seal(data["versions"])}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
