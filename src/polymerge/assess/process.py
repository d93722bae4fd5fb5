"""Starts a worker and listens to it. A worker that dies says why by its exit and its last line of standard error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .worker import CandidateJob, as_json

TAIL = 300  # characters of a worker's last words
PACKAGE = Path(__file__).parents[2]  # the worker runs this very copy of polymerge


def run_in_process(job: CandidateJob) -> Iterator[dict[str, Any]]:
    """What the worker of a job says, event by event; where it dies, at last a failure of the whole job."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        worker = subprocess.Popen(
            [sys.executable, "-m", "polymerge.assess.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])},
        )
        assert worker.stdin and worker.stdout
        try:
            try:
                worker.stdin.write(as_json(job))
                worker.stdin.close()
            except BrokenPipeError:
                pass  # it died at once: its exit says more
            for line in worker.stdout:
                yield json.loads(line)
            code = worker.wait()
        finally:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            worker.stdout.close()
        if code:
            said.seek(0)
            yield {"event": "failed", "expert": None, "task": None, "reason": _reason(code, said.read())}


def _reason(code: int, said: str) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = ": the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"its process was ended by {name}{hint}"
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    return f"its process ended with {code}: {last[-TAIL:]}"
