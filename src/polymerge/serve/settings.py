"""What a server may do and for whom. Knows limits and keys; does not know requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PolymergeError

# Names that a browser on this machine may call a server by. Another name that leads here is an attack on it
# (a web page whose name was pointed at 127.0.0.1 after it was loaded).
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
SHORTEST_KEY = 16


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server.

    Attributes:
        keys: name -> API key; without any, everyone may ask.
        requests_per_minute: of one key, or of everyone together where there are no keys; None is no limit.
        max_body_bytes: of a request.
        max_tokens: of one answer; also what an answer may have where a request names no number.
        max_choices: answers that one request may ask for.
        seconds: an answer must be whole so long after it was asked for.
        margin: how much likelier the field of a new turn must be for a conversation to change its expert.
        cors_origins: web pages of other origins that may ask.
        hosts: names under which the server may be asked; none is any.
        log_prompts: write prompts and answers to the log.
    """

    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    requests_per_minute: int | None = None
    max_body_bytes: int = 2**20
    max_tokens: int = 2048
    max_choices: int = 64
    seconds: float = 600.0
    margin: float = 0.2
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    log_prompts: bool = False


def read_keys(file: str | Path) -> dict[str, str]:
    """API keys of a file: a line each, `KEY` or `NAME KEY`; empty lines and lines that begin with # are skipped.

    Raises:
        PolymergeError: the file cannot be read or a line of it is no key. No message holds a key.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PolymergeError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, key = words if len(words) == 2 else (f"key-{number}", words[0])
        if len(words) > 2 or len(key) < SHORTEST_KEY or not key.isascii():
            raise PolymergeError(
                f"{file}, line {number}: not KEY or NAME KEY, the key of at least {SHORTEST_KEY} ASCII characters"
            )
        if name in keys or key in keys.values():
            raise PolymergeError(f"{file}, line {number}: this name or key was given before")
        keys[name] = key
    if not keys:
        raise PolymergeError(f"{file}: holds no key")
    return keys
