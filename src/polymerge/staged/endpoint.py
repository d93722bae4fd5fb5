"""A thinker behind an OpenAI-compatible endpoint.

Knows the protocol, retries and time-outs. Whatever the other side does (nothing, too slowly, garbage, half an answer)
becomes a failed thought. The key comes from the environment and is in no message, log or repr.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from ..data.text import encodable
from ..errors import RecipeError
from ..recipe.response import ThinkerSettings
from .thinker import DRAWN_AT
from .thought import OUT_OF_TIME, Thought, failed

log = logging.getLogger(__name__)

LARGEST_ANSWER = 8 * 2**20  # bytes of an answer's body
LONGEST_TOKEN = 16  # characters
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between two tries; doubled every time
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# After so many prompts in a row that failed with all their retries, the rest is not tried any more.
GIVE_UP_AFTER = 4


class _Retry(Exception):
    """This try failed, the next may not. `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Refused(Exception):
    """The next try would fail as well."""


class EndpointThinker:
    """Asks `{endpoint}/chat/completions`.

    Args:
        transport, sleep: stand-ins for tests.

    Raises:
        RecipeError: `key_env` names an environment variable that is not set.
    """

    def __init__(
        self,
        settings: ThinkerSettings,
        *,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings, self._sleep = settings, sleep
        self._in_a_row, self._lock = 0, threading.Lock()
        headers = {"user-agent": "polymerge"}
        if settings.key_env:
            key = os.environ.get(settings.key_env, "").strip()
            if not key.isascii() or not key.isprintable() or not key:
                raise RecipeError(
                    f"thinker: the environment variable {settings.key_env} holds no usable key; "
                    f"set it, or leave key_env out"
                )
            headers["authorization"] = f"Bearer {key}"
        self._client = httpx2.Client(
            headers=headers, timeout=settings.timeout, transport=transport, follow_redirects=False
        )
        self._url = f"{str(settings.endpoint).rstrip('/')}/chat/completions"

    @property
    def name(self) -> str:
        return f"{self._settings.model} at {self._settings.endpoint}"

    @property
    def fingerprint(self) -> str:
        return self.name

    def think(
        self, prompts: Sequence[str], *, max_tokens: int, deadline: float | None = None, seed: int | None = None
    ) -> list[Thought]:
        """As in the protocol; `concurrency` prompts at once."""
        self._in_a_row = 0
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            return list(pool.map(lambda prompt: self._think(prompt, max_tokens, deadline, seed), prompts))

    def unload(self) -> None:
        """Nothing to give back."""

    def _think(self, prompt: str, max_tokens: int, deadline: float | None, seed: int | None) -> Thought:
        reason = OUT_OF_TIME
        for attempt in range(self._settings.retries + 1):
            if self._in_a_row >= GIVE_UP_AFTER:
                return failed(f"{self.name} failed {GIVE_UP_AFTER} times in a row and is not asked again")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return failed(reason)
            try:
                thought = self._ask(prompt, max_tokens, left, seed)
            except _Retry as error:
                reason, pause = str(error), min(LONGEST_PAUSE, error.wait or FIRST_PAUSE * 2**attempt)
                log.info("thinker: try %d of %d: %s", attempt + 1, self._settings.retries + 1, reason)
                if attempt < self._settings.retries:
                    self._sleep(pause if left is None else min(pause, left))
            except _Refused as error:
                reason = str(error)
                break
            else:
                with self._lock:
                    self._in_a_row = 0
                return thought
        with self._lock:
            self._in_a_row += 1
        return failed(f"{self.name}: {reason}")

    def _ask(self, prompt: str, max_tokens: int, left: float | None, seed: int | None) -> Thought:
        limit = self._settings.timeout if left is None else min(self._settings.timeout, left)
        body = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            **({"temperature": 0} if seed is None else {"temperature": DRAWN_AT, "seed": seed}),
        }
        began = time.monotonic()
        try:
            with self._client.stream("POST", self._url, json=body, timeout=limit) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if time.monotonic() - began > limit:  # httpx2 bounds the wait for every chunk, not for all
                        raise _Retry(f"no whole answer within {limit:.0f} s")
                    if len(data) > LARGEST_ANSWER:
                        raise _Refused("the answer is larger than 8 MiB")
        except httpx2.TimeoutException:
            raise _Retry(f"no answer within {limit:.0f} s") from None
        except httpx2.TransportError as error:
            raise _Retry(f"{type(error).__name__}: {error}") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Refused(f"{type(error).__name__}: {error}") from None
        _check_status(response)
        return _thought(bytes(data), longest=max_tokens * LONGEST_TOKEN)


def _check_status(response: httpx2.Response) -> None:
    status = response.status_code
    if status in AGAIN:
        asked = response.headers.get("retry-after", "")
        raise _Retry(f"status {status}", float(asked) if asked.isascii() and asked.isdigit() else None)
    if status != 200:
        hint = {401: ": is the key right?", 403: ": is the key right?", 404: ": is endpoint right, with its /v1?"}
        raise _Refused(f"status {status}{hint.get(status, '')}")


def _thought(data: bytes, longest: int) -> Thought:
    """The thought in an answer's body. What is cut off or no chat completion may be better the next time; what is
    longer than was asked for is cut."""
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        usage = answer.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Retry("the answer is not a chat completion") from None
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return Thought(
        encodable(text).strip()[:longest],
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
        finish,  # type: ignore[arg-type]
    )


def _count(usage: Any, key: str) -> int:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0
