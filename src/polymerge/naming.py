"""Which texts may become the name of an expert, of a file or of a folder, whoever wrote them.

Every name that is read from a recipe, a manifest, an index, a router's record or an export's note is checked here,
where it is parsed. Knows strings; touches no disk.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

# An expert's name becomes a folder's name, a route's name and an HTTP header's value.
EXPERT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RESERVED_NAMES = frozenset({"average", "auto", "staged", "base", "default"})
# Parts of a path, and what some file system takes for more than a letter: a drive, a stream, a control character.
_NOT_PLAIN = re.compile(r'[\\:*?"<>|\x00-\x1f\x7f]')
LONGEST_NAME = 255  # bytes, of most file systems


def check_expert_names(names: Collection[str]) -> None:
    """Raises ValueError unless all names are safe and no two are one."""
    for name in names:
        check_expert_name(name)
    if len({name.casefold() for name in names}) < len(names):
        raise ValueError("two experts have the same name (upper and lower case do not tell them apart)")


def check_expert_name(name: str) -> None:
    """Raises ValueError unless `name` is safe as a folder, a route and a header."""
    if not isinstance(name, str):
        raise ValueError(f"expert name {name!r} is no text")
    if name.casefold() in RESERVED_NAMES:
        raise ValueError(f"expert name {name!r} is reserved ({', '.join(sorted(RESERVED_NAMES))})")
    if not EXPERT_NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"expert name {name!r} must be 1 to 64 letters, digits, '.', '_' or '-', and start with a letter or digit"
        )


def is_plain(name: str) -> bool:
    """Whether a name stands for one file or folder of the folder that it is in, on any system."""
    if not name or name in (".", "..") or "/" in name or _NOT_PLAIN.search(name):
        return False
    try:
        return len(name.encode()) <= LONGEST_NAME
    except UnicodeEncodeError:  # half a character
        return False


def check_path(path: str) -> None:
    """Raises ValueError unless `path` is relative, with '/' between plain names, and so stays inside its folder."""
    if not all(is_plain(part) for part in path.split("/")):
        raise ValueError(f"{path!r} is not a plain path inside the folder; refused")


def check_paths(paths: Iterable[str]) -> None:
    """Raises ValueError unless all paths are plain and are as many on a system that does not tell cases apart."""
    spelled: dict[str, str] = {}
    for path in paths:
        check_path(path)
        parts = path.split("/")
        for end in range(1, len(parts) + 1):
            part = "/".join(parts[:end])
            if spelled.setdefault(_folded(part), part) != part:
                raise ValueError(
                    f"{path!r} and {spelled[_folded(part)]!r} differ in upper and lower case alone; refused"
                )


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
