"""vLLM's routes. Knows nothing of experts."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from ..http_api import HttpApi


class VllmApi(HttpApi):
    """An OpenAI-compatible server; arguments are `HttpApi`'s."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        super().__init__(url, "vLLM", "VLLM_API_KEY", api_key=api_key, timeout=timeout)

    def models(self) -> list[dict[str, Any]]:
        """What the server offers."""
        models: list[dict[str, Any]] = self.ask("/v1/models")["data"]
        return models

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One call of /v1/completions. Raises as `HttpApi.ask`."""
        reply: dict[str, Any] = self.ask("/v1/completions", body)
        return reply

    def stream(self, body: dict[str, Any], *, timeout: float | None = None) -> Generator[dict[str, Any], None, None]:
        """The choices of one streamed call of /v1/completions, as they come. Closing it makes the server stop. Raises
        as `HttpApi.ask`."""
        for event in self.events("/v1/completions", body, timeout=timeout):
            yield from event["choices"]
