"""llama-server's routes. Knows nothing of experts."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from ...errors import ModelError
from ..http_api import HttpApi

A_LETTER, ALL = "root ::= [ -~]+", 1_000_000


class LlamaApi(HttpApi):
    """A llama-server, of another process or of this one; arguments are `HttpApi`'s."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        super().__init__(url, "llama.cpp", "LLAMA_API_KEY", api_key=api_key, timeout=timeout)

    def properties(self) -> dict[str, Any]:
        """What /props says of the server."""
        properties: dict[str, Any] = self.ask("/props")
        return properties

    def adapters(self) -> list[dict[str, Any]]:
        """The loaded adapters: their numbers and files."""
        adapters: list[dict[str, Any]] = self.ask("/lora-adapters")
        return adapters

    def complete(self, body: dict[str, Any], *, timeout: float | None = None) -> dict[str, Any]:
        """One call of /completion. Raises as `HttpApi.ask`."""
        reply: dict[str, Any] = self.ask("/completion", body, timeout=timeout)
        return reply

    def stream(self, body: dict[str, Any], *, timeout: float | None = None) -> Generator[dict[str, Any], None, None]:
        """The events of one streamed call of /completion. Closing it makes the server stop."""
        return self.events("/completion", {**body, "stream": True}, timeout=timeout)

    def next_scores(
        self, ids: Sequence[int], lora: list[dict[str, Any]], *, token: int | None = None, count: int = 1
    ) -> dict[str, Any]:
        """How likely what follows a text is: the `count` likeliest tokens, and with `token` that one too.

        llama.cpp tells the log-probability of the token that it takes, before any sampler, so it is made to take this
        one. Of a token that is a part of a character it tells nothing: then it is made to take a letter, and to tell of
        all tokens. What the text shares with a slot's last one is not read again.
        """
        body: dict[str, Any] = {"prompt": list(ids), "n_predict": 1, "temperature": 0.0, "n_probs": max(count, 1)}
        body |= {"lora": lora, "return_tokens": True, "cache_prompt": True, "repeat_penalty": 1.0}
        told = self._told(body if token is None else {**body, "logit_bias": [[token, 1e6]]})
        if told and (token is None or told["id"] == token):
            return told
        told = self._told({**body, "grammar": A_LETTER, "n_probs": ALL if token is not None else body["n_probs"]})
        top = (told or {}).get("top_logprobs") or []
        found = next((entry for entry in top if token in (None, entry["id"])), None)
        if found is None:
            raise ModelError(f"{self.url}: the server does not tell a token's log-probability; is it llama.cpp's?")
        return {**found, "top_logprobs": top[: body["n_probs"]]}

    def _told(self, body: dict[str, Any]) -> dict[str, Any] | None:
        told = self.complete(body).get("completion_probabilities") or [None]
        first: dict[str, Any] | None = told[0]
        return first

    def tokenize(self, text: str) -> list[int]:
        """A text's tokens, special ones not among them."""
        tokens: list[int] = self.ask("/tokenize", {"content": text, "add_special": False})["tokens"]
        return tokens
