"""An engine that remembers its answers in a file: what was asked once is not run again, also after a kill.

Knows requests and their results. The key of an answer holds the engine's fingerprint, the expert, the request and the
version of polymerge; so another bundle never gives an answer of this one, and a router that was changed finds
the answers of just those requests that it sends where they went before.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import PolymergeError
from ...host import cache_folder
from ...version import __version__
from ..base import Engine, GenerateRequest, Generation, Score, ScoreRequest
from .forwarding import ForwardingEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

# Requests between two writes: what a kill can cost.
CHUNK = 256
Request = TypeVar("Request", GenerateRequest, ScoreRequest)
Result = TypeVar("Result", Generation, Score)
# Called with the requests that are done and all of them.
OnRequests = Callable[[int, int], None]


class CachedEngine(ForwardingEngine):
    """Wraps an engine.

    Args:
        file: an SQLite file; None remembers nothing and only reports progress.
        salt: whatever else the results depend on and the engine's fingerprint does not hold (a dtype).
        progress: called after every chunk of requests.
    """

    def __init__(
        self,
        engine: Engine,
        file: Path | None,
        *,
        salt: Mapping[str, str] | None = None,
        progress: OnRequests | None = None,
    ) -> None:
        super().__init__(engine)
        self._file, self._progress = file, progress
        self._salt = [engine.fingerprint, __version__, dict(salt or {})]
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As in the contract. Answers that were sampled without a seed are never remembered."""
        return self._answered(requests, self._engine.generate, Generation)

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """As in the contract."""
        return self._answered(requests, self._engine.loglikelihood, Score)

    def _answered(
        self, requests: Sequence[Request], run: Callable[[Sequence[Request]], list[Result]], kind: type[Result]
    ) -> list[Result]:
        keys = [self._key(request) for request in requests]
        known = self._known([key for key in keys if key], kind)
        results = [known.get(key) if key else None for key in keys]
        missing = [number for number, result in enumerate(results) if result is None]
        # the longest first, like lengths side by side, and the choices of one question in one chunk
        missing.sort(key=lambda n: _length_and_text(requests[n]), reverse=True)
        for start in range(0, len(missing), CHUNK):
            numbers = missing[start : start + CHUNK]
            for number, result in zip(numbers, run([requests[n] for n in numbers]), strict=True):
                results[number] = result
            self._remember({keys[n]: results[n] for n in numbers})
            if self._progress:
                self._progress(len(requests) - len(missing) + start + len(numbers), len(requests))
        return [result for result in results if result is not None]

    def _key(self, request: GenerateRequest | ScoreRequest) -> str:
        """Empty for what must not be remembered."""
        if self._file is None or (getattr(request, "temperature", 0.0) > 0 and getattr(request, "seed", 0) is None):
            return ""
        asked = asdict(request)
        if asked.pop("deadline", None) is not None:  # the answer may be cut by the clock
            return ""
        text = json.dumps([*self._salt, type(request).__name__, asked], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _known(self, keys: Sequence[str], kind: type[Result]) -> dict[str, Result]:
        answers: dict[str, Result] = {}
        if keys:
            with self._open() as database:
                for key in dict.fromkeys(keys):
                    row = database.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
                    if row:
                        answers[key] = kind(**json.loads(row[0]))
        return answers

    def _remember(self, answers: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(asdict(answer))) for key, answer in answers.items() if key]
        if rows:
            with self._open() as database:
                database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        assert self._file is not None
        try:
            database = sqlite3.connect(self._file, timeout=60)
            try:
                with database:  # commits as a whole, or not at all
                    yield database
            finally:
                database.close()
        except sqlite3.Error as error:
            raise PolymergeError(f"{self._file}: the cache cannot be used ({error}); delete the file") from None


def answers_file(engine: Engine) -> Path:
    """Where an engine's answers are remembered: one file a bundle or model in the cache's folder."""
    return cache_folder() / "answers" / f"{engine.fingerprint[:16]}.sqlite"


def _length_and_text(request: GenerateRequest | ScoreRequest) -> tuple[int, str]:
    prompt = request.context if isinstance(request, ScoreRequest) else request.prompt
    return len(prompt), str(prompt)
