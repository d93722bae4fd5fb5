"""A server that speaks as much of vLLM's API as the engine needs, without a model: for tests of the client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# complete(body of /v1/completions) -> the first choice, or an error (status, message)
Complete = Callable[[dict[str, Any]], dict[str, Any] | tuple[int, str]]


@contextmanager
def fake_vllm(models: list[str], complete: Complete, *, max_model_len: int = 32) -> Iterator[str]:
    """Its address for as long as the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = [{"id": name, "max_model_len": max_model_len} for name in models]
            self._send(200, {"data": listed} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = complete(asked)
            if isinstance(reply, tuple):
                self._send(reply[0], {"error": {"message": reply[1]}})
            elif "token_ids" in reply and asked.get("stream"):
                self._stream(reply)
            else:
                self._send(200, {"choices": [reply]})

        def _stream(self, reply: dict[str, Any]) -> None:
            """A token an event; what is beside the token ids comes with the last one."""
            self.send_response(200)
            self.end_headers()
            *first, last = reply["token_ids"] or [None]
            with suppress(OSError):  # the client may go
                for token in first:
                    self._event({"token_ids": [token], "finish_reason": None})
                    time.sleep(reply.get("pause", 0.0))
                if not reply.get("broken"):
                    self._event({**reply, "token_ids": [last]})
                    self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, choice: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, data: dict[str, Any]) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
