"""What a run has done so far: a file of JSON lines beside the submission.

A line is written when its work is whole, and synced; a killed run leaves at most one broken line, the last, which is
dropped. Knows lines and whose run they belong to; does not know what they mean.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..bundle.files import disk_errors, scratches_of, write_bytes
from ..data.rows import read_whole_rows
from ..errors import DataError, OutputExistsError


class Journal:
    """The journal of one submission.

    Args:
        output: the submission's file; the journal is `<output>.partial` beside it.
        identity: what must be equal for half-done work to be gone on with.
        overwrite: drop the half-done work of another run.

    Raises:
        OutputExistsError: half-done work of another run is there, or another's file.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
        self.path = output.with_name(output.name + ".partial")
        self.lines: list[dict[str, Any]] = []
        self._output = output
        written = self._written()
        if written and written[0] == identity:
            self.lines = written[1:]
        elif written and not overwrite:
            raise OutputExistsError(
                f"{self.path}: half-done work of another input, bundle or setting; give --overwrite to drop it"
            )
        for left in scratches_of(self.path):
            left.unlink()
        write_bytes(self.path, b"".join(_line(entry) for entry in [identity, *self.lines]))

    def _written(self) -> list[dict[str, Any]]:
        """The lines of a journal that is there. A file of another kind is a stranger's and stays."""
        if not os.path.lexists(self.path):
            return []
        written = [] if self.path.is_symlink() or not self.path.is_file() else _rows(self.path)
        if not written or "polymerge" not in written[0]:
            raise OutputExistsError(
                f"{self.path}: is in the way and is no journal of polymerge's, so it is not touched; move it away, or "
                "choose another --output"
            )
        return written

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


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_whole_rows(path)
    except DataError:
        return []


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
