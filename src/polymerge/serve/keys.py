"""API keys: how a file names them, who a request says it is, and the change of keys while the server runs.

Keys are held as digests, and all are compared, each in constant time. Knows files and headers, not routes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ..errors import PolymergeError
from .errors import ApiError

logger = logging.getLogger("polymerge.serve")

SHORTEST_KEY = 16
ADMIN = "admin"


class Keys(dict[str, str]):
    """Name -> key.

    Attributes:
        admins: names of the keys that may change what is served.
    """

    def __init__(self, keys: Mapping[str, str] | None = None, admins: frozenset[str] = frozenset()) -> None:
        super().__init__(keys or {})
        self.admins = admins


def read_keys(file: str | Path) -> Keys:
    """API keys of a file: a line each, `KEY`, `NAME KEY` or `NAME KEY admin`; empty lines and lines that begin with #
    are skipped. A file that others can read is warned of.

    Raises:
        PolymergeError: the file cannot be read or a line of it is no key. No message holds a key.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PolymergeError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    if os.name == "posix" and Path(file).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s: other users of this machine can read the keys in it; chmod 600 %s", file, file)
    keys, admins = dict[str, str](), set[str]()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) == 3 and words[2] == ADMIN:
            admins.add(words[0])
            words.pop()
        name, key = words if len(words) == 2 else (f"key-{number}", words[0])
        if len(words) > 2 or len(key) < SHORTEST_KEY or not key.isascii():
            raise PolymergeError(
                f"{file}, line {number}: not KEY, NAME KEY or NAME KEY admin, the key of at least {SHORTEST_KEY} ASCII "
                "characters"
            )
        if name in keys or key in keys.values():
            raise PolymergeError(f"{file}, line {number}: this name or key was given before")
        keys[name] = key
    if not keys:
        raise PolymergeError(f"{file}: holds no key")
    return Keys(keys, frozenset(admins))


class KeyRing:
    """The keys that open a running server.

    Args:
        file: from which they are read again.
    """

    def __init__(self, keys: Mapping[str, str], file: Path | None = None) -> None:
        self._file = file
        self._take(keys)

    def reread(self) -> None:
        """Takes the file's keys as they are now. A file that cannot be used leaves them as they were. What runs under
        an old key goes on."""
        if self._file is None:
            return
        try:
            self._take(read_keys(self._file))
        except PolymergeError as error:
            logger.error("the keys stay as they were: %s", error)
        else:
            logger.info("%s: read again, %d keys", self._file, len(self._digests))

    def name(self, authorization: str) -> str | None:
        """The name of the key in a header; None where the server has no keys. Raises ApiError where it is not one."""
        if not self._digests:
            return None
        sent = hashlib.sha256(_key(authorization).encode()).digest()
        matches = [name for name, digest in self._digests.items() if hmac.compare_digest(sent, digest)]
        if not matches:
            raise ApiError(401, "no valid API key; send `Authorization: Bearer KEY`", code="invalid_api_key")
        return matches[0]

    def check_admin(self, name: str | None) -> None:
        """Raises ApiError unless the key of this name may change what is served."""
        if name not in self._admins:
            message = "this needs an admin's key: a line `NAME KEY admin` in the file of --api-key-file"
            raise ApiError(403, message, code="admin_key_needed")

    def _take(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: hashlib.sha256(key.encode()).digest() for name, key in keys.items()}
        self._admins: frozenset[str] = keys.admins if isinstance(keys, Keys) else frozenset()


def _key(authorization: str) -> str:
    """The key of `Bearer KEY`, or the password of `Basic ...`, which a browser asks for."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
