"""How the command line writes: sentences, lines that are written over, bytes and times in words, JSON."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console

# A terminal that says less than the first (0 where it does not know) is written to as if it had the second.
LEAST_WIDTH, USUAL_WIDTH = 20, 80


def _console(**options: Any) -> Console:
    said = os.environ.get("COLUMNS", "")
    unusable = said.isdecimal() and int(said) < LEAST_WIDTH  # at 0 rich would print nothing at all
    return Console(highlight=False, width=USUAL_WIDTH if unusable else None, **options)


# Results go to standard output; progress and errors to standard error, so that output can be piped.
out = _console()
err = _console(stderr=True)
_BEFORE_A_UNIT = re.compile(r"(?<=\d) (?=(?:B|kB|MB|GB|s|min|h)\b)")


def size(count: float) -> str:
    """Bytes for people: 538.1 MB (decimal, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """Seconds for people: 3 min 20 s."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def print_json(data: Any) -> None:
    """One JSON object, for machines."""
    json.dump(data, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")


def write(text: str) -> None:
    """A piece of an answer as it is made."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    """A line of results that is not broken at the terminal's width."""
    out.print(text, markup=False, soft_wrap=True)


def tell(text: str, indent: int = 2, to: Console | None = None) -> None:
    """Sentences of results, a line each: in a terminal broken between words, never inside one or before a unit.

    Args:
        indent: spaces before its further lines.
        to: by default standard output.
    """
    to = to or out
    if not to.is_terminal:
        to.print(text.replace("\N{NO-BREAK SPACE}", " "), markup=False, soft_wrap=True)
        return
    whole = _BEFORE_A_UNIT.sub("\N{NO-BREAK SPACE}", text)
    width = to.width if to.width >= LEAST_WIDTH else USUAL_WIDTH
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    for sentence in whole.split("\n"):
        for line in wrapper.wrap(sentence) or [""]:
            to.print(line.replace("\N{NO-BREAK SPACE}", " "), markup=False, soft_wrap=True)


def over(line: str, *, last: bool) -> None:
    """A line of progress that the next one is written over: in a terminal never wider than that is."""
    if not err.is_terminal:
        err.print(line, markup=False, soft_wrap=True)
        return
    room = max(err.width - 1, 1)
    short = line if cell_len(line) <= room else set_cell_size(line, room - 1) + "…"
    err.print(set_cell_size(short, room), end="\n" if last else "\r", markup=False, soft_wrap=True)
