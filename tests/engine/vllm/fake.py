"""A server that speaks as much of vLLM's API as the engine needs, without a model: for tests of the client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.served import Quiet, served

# complete(body of /v1/completions) -> the first choice, or an error (status, message)
Complete = Callable[[dict[str, Any]], dict[str, Any] | tuple[int, str]]


@contextmanager
def fake_vllm(models: list[str], complete: Complete, *, max_model_len: int = 32) -> Iterator[str]:
    """Its address for as long as the context lasts."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            listed = [{"id": name, "max_model_len": max_model_len} for name in models]
            self.send({"data": listed} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            asked = self.body()
            reply = complete(asked)
            if isinstance(reply, tuple):
                self.send({"error": {"message": reply[1]}}, reply[0])
            elif "token_ids" in reply and asked.get("stream"):
                self._stream(reply)
            else:
                self.send({"choices": [reply]})

        def _stream(self, reply: dict[str, Any]) -> None:
            """A token an event; what is beside the token ids comes with the last one."""
            self.send_response(200)
            self.end_headers()
            *first, last = reply["token_ids"] or [None]
            with suppress(OSError):  # the client may go
                for token in first:
                    self.event({"choices": [{"token_ids": [token], "finish_reason": None}]})
                    time.sleep(reply.get("pause", 0.0))
                if not reply.get("broken"):
                    self.event({"choices": [{**reply, "token_ids": [last]}]})
                    self.wfile.write(b"data: [DONE]\n\n")

    with served(Handler) as url:
        yield url
