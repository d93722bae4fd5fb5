"""What a text that a user wrote is on this machine's disk. Knows the disk, and nothing of what lies there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import PolymergeError


def path_of(value: Any, what: str) -> Path:
    """What was given for a path, expanded. Raises PolymergeError, which says what it is for, where it is none."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise PolymergeError(f"{what}: give the path of a folder or file; {value!r} is none")
    return expanded(text)


def expanded(text: str | Path) -> Path:
    """The path with `~` and `~user` spelled out; as it is, where nobody of that name is here."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def here(text: str | Path) -> Path | None:
    """The expanded path where something lies there; None also for what no file system takes for a path."""
    path = expanded(text)
    try:
        return path if path.exists() else None
    except (OSError, ValueError):  # too long, or behind a folder that may not be looked into
        return None
