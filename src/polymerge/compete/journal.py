"""What a run has done so far: a file of JSON lines beside the submission.

A line is written when its work is whole, and synced; a killed run leaves at most one broken line, the last, which is
dropped. Knows lines and whose run they belong to; does not know what they mean.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..bundle.files import disk_errors
from ..data.rows import read_whole_rows
from ..errors import OutputExistsError


class Journal:
    """The journal of one submission.

    Args:
        output: the submission's file; the journal is `<output>.partial` beside it.
        identity: what must be equal for half-done work to be gone on with.
        overwrite: drop the half-done work of another run.

    Raises:
        OutputExistsError: half-done work of another run is there.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
        self.path = output.with_name(output.name + ".partial")
        self.lines: list[dict[str, Any]] = []
        self._output = output
        written = read_whole_rows(self.path) if self.path.exists() else []
        if written and written[0] == identity:
            self.lines = written[1:]
        elif written and not overwrite:
            raise OutputExistsError(
                f"{self.path}: half-done work of another input, bundle or setting; give --overwrite to drop it"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".writing")
        with disk_errors(output.parent):
            scratch.write_bytes(b"".join(_line(entry) for entry in [identity, *self.lines]))
            scratch.rename(self.path)

    def add(self, entry: dict[str, Any]) -> None:
        """Notes finished work."""
        with disk_errors(self._output.parent), self.path.open("ab") as handle:
            handle.write(_line(entry))
            handle.flush()
            os.fsync(handle.fileno())
        self.lines.append(entry)

    def remove(self) -> None:
        """The submission is whole; its journal is not needed any more."""
        self.path.unlink(missing_ok=True)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
