"""A vLLM server of our own: started on an exported folder, waited for, and ended with what started it.

Knows processes, ports and logs. What vLLM is told is `vllm_folder`'s, and whatever the caller adds is passed through.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ...errors import MissingExtraError, ModelError
from .folder import read_note, serve_arguments
from .form import GUIDANCE

log = logging.getLogger(__name__)

START_SECONDS = 1800.0  # a large model loads for minutes, and compiles for some more
STOP_SECONDS = 30.0
LOG_LINES = 25
# Only numbers of vLLM's own would go out; and a folder needs no hub.
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
FORMS = "--structured-outputs-config"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ERROR = re.compile(r"(\w*(?:Error|Exception): .+)")


class VllmServer:
    """`vllm serve` on an exported folder, as a context manager. It ends with the thread that enters it, at the latest.

    Args:
        folder: made by `polymerge export --to vllm`.
        extra: further arguments for `vllm serve` (`--tensor-parallel-size 8`, ...); they win over ours.
        python: the interpreter that has vLLM; by default the `vllm` command on the path is run.
        say: hears of progress and, when vLLM fails, the last lines of its log.

    Attributes:
        url: of the OpenAI-compatible API, without a slash at its end.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        extra: Sequence[str] = (),
        python: str | None = None,
        start_seconds: float = START_SECONDS,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self._note = read_note(self.folder)
        self._extra, self._say, self._start_seconds = list(extra), say or log.info, start_seconds
        # `python -m` of the command itself fails with builds of vLLM that are packaged under another name
        server = "vllm.entrypoints.openai.api_server"
        path = str(self.folder.resolve())
        self._program = [python, "-m", server, "--model", path] if python else [_vllm_command(), "serve", path]
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path()
        self.url = ""

    def command(self, port: int) -> list[str]:
        """What is run. A host or port among the extra arguments stands after ours and wins, and must not be given."""
        here = ["--host", "127.0.0.1", "--port", str(port)]
        forms = [FORMS, json.dumps(GUIDANCE)] if self.guided else []
        return [*self._program, *serve_arguments(self.folder, self._note), *forms, *here, *self._extra]

    @property
    def guided(self) -> bool:
        """Whether it holds answers by llguidance: unless the extra arguments say what does."""
        return not any(argument.startswith(FORMS) for argument in self._extra)

    def __enter__(self) -> VllmServer:
        for argument in self._extra:
            if argument.split("=")[0] in ("--host", "--port", "--served-model-name", "--lora-modules"):
                raise ModelError(f"{argument}: polymerge sets this argument of vLLM itself; leave it out")
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        handle, name = tempfile.mkstemp(prefix="polymerge-vllm-", suffix=".log")
        self._log = Path(name)
        with os.fdopen(handle, "wb") as target:
            try:
                # its own session: its workers go with it, and a Ctrl-C reaches it through us
                self._process = subprocess.Popen(
                    self.command(port),
                    stdout=target,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**QUIET, **os.environ},
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            except OSError as error:
                raise ModelError(f"{self._program[0]}: cannot be run: {error.strerror}") from None
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        died = not self.running
        self.stop()
        if died:
            self._say(f"vLLM had ended by itself; its log is {self._log}")
        else:
            self._log.unlink(missing_ok=True)

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The number of the process, whose children do the work. Only while it runs."""
        assert self._process is not None
        return self._process.pid

    def last_lines(self, count: int = LOG_LINES) -> list[str]:
        """The end of vLLM's log."""
        return self._log.read_text(errors="replace").splitlines()[-count:] if self._log.is_file() else []

    def stop(self) -> None:
        """Asks vLLM to end, and ends it with all its workers when it does not."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("vLLM did not end within %d s; it is killed", STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlived it
        process.wait()

    def _wait(self) -> None:
        began = told = time.monotonic()
        self._say(f"starting vLLM on {self.folder} (its log: {self._log})")
        while not _is_ready(self.url):
            now = time.monotonic()
            if not self.running:
                self._fail("vLLM ended while starting")
            if now - began > self._start_seconds:
                self._fail(f"vLLM was not ready after {self._start_seconds:.0f} s")
            if now - told > 10:
                told = now
                self._say(f"waiting for vLLM, {now - began:.0f} s: {(self.last_lines(1) or [''])[0][-120:]}")
            time.sleep(0.3)
        self._say(f"vLLM is ready after {time.monotonic() - began:.0f} s")

    def _fail(self, what: str) -> None:
        for line in self.last_lines():
            self._say(line)
        lines = [line for line in self.last_lines(400) if " WARNING " not in line]  # which name errors that may come
        errors = [match[1] for line in lines if (match := _ERROR.search(line))]
        reason = f": {errors[0][:300]}" if errors else ""
        raise ModelError(f"{what}{reason}; its log is {self._log}")


def _end_with_parent() -> None:
    """In the new process: the kernel ends it when this one is killed (Linux; elsewhere it would live on)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _vllm_command() -> str:
    command = shutil.which("vllm")
    if command is None:
        raise MissingExtraError(
            "no `vllm` command on the path; install vLLM (`pip install vllm`, best in an environment of its own) "
            "and name that environment's python"
        )
    return command


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
