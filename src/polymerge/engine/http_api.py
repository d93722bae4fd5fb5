"""A model's server over HTTP: JSON in, JSON out, and its refusals as one line. Knows no server's routes."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any

from ..errors import EngineDownError, ModelError, PolymergeError

HEALTH_SECONDS = 5.0


class HttpApi:
    """A server that speaks JSON.

    Args:
        url: such as http://127.0.0.1:8000, with or without /v1.
        name: of the server, as errors say it.
        key_variable: the environment variable that the server itself reads its key from.
        api_key: the server's `--api-key`, if it has one; by default what `key_variable` holds.
        timeout: seconds for one request.
    """

    def __init__(
        self, url: str, name: str, key_variable: str, *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        self.url, self.name, self._key_variable = url.rstrip("/").removesuffix("/v1"), name, key_variable
        if not self.url.startswith(("http://", "https://")):
            raise ModelError(f"{url}: not the address of a server; it begins with http:// or https://")
        self._timeout = timeout
        self.headers = {"Content-Type": "application/json"}
        if key := api_key or os.environ.get(key_variable, "").strip():
            self.headers["Authorization"] = f"Bearer {key}"

    def ask(self, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """One call, within so many seconds where the usual ones are too many.

        Raises:
            ModelError: the server refuses or fails. EngineDownError: it does not answer.
        """
        with self._opened(path, body, timeout or self._timeout) as answer:
            try:
                return json.load(answer)
            except ValueError:
                raise ModelError(f"{self.url}{path}: the answer is not JSON; is it {self.name}'s address?") from None
            except (OSError, http.client.HTTPException) as error:
                raise EngineDownError(f"{self.name} at {self.url} broke off ({_short(error)})") from None

    def events(
        self, path: str, body: dict[str, Any], *, timeout: float | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """The events of one streamed call, as they come. Closing it makes the server stop. Raises as `ask`."""
        with self._opened(path, body, timeout or self._timeout) as answer:
            try:
                for line in answer:
                    data = line.strip().removeprefix(b"data:").strip()
                    if not data or data == b"[DONE]" or data.startswith(b":"):
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise ModelError(f"{self.name} at {self.url}: {event['error'].get('message', 'an error')}")
                    yield event
            except (OSError, http.client.HTTPException) as error:
                raise EngineDownError(f"{self.name} at {self.url} broke off ({_short(error)})") from None

    def healthy(self) -> bool:
        """Whether the server answers."""
        try:
            with self._opened("/health", None, HEALTH_SECONDS) as answer:
                return bool(answer.status == 200)
        except PolymergeError:
            return False

    def _opened(self, path: str, body: dict[str, Any] | None, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            return urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            cure = f"; its key is read from {self._key_variable}" if error.code == 401 else ""
            raise ModelError(f"{self.name} at {self.url}: {error.code}: {_reason(error)}{cure}") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineDownError(f"{self.name} at {self.url} does not answer ({_short(error)})") from None


def _short(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", "replace")
    try:
        data = json.loads(text)
        text = data["error"]["message"] if "error" in data else data["message"]
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:300] or str(error.reason)
