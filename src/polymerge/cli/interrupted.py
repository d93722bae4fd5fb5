"""A merge that is stopped by Ctrl-C says what is done and how to go on; a second run says what lies there. An expert
that was being added or removed is in its bundle or it is not, and that is said.

Knows what the terminal was told, and a work folder's size; what is half-done is `polymerge.merging.journal`'s.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..merging.run import OnProgress, Progress

# What a shell takes for "stopped by Ctrl-C".
STOPPED = 130


def half_done_work(output: Path, *, resume: bool, say: Callable[[str], None]) -> None:
    """Says what an earlier command that was interrupted has left, where this merge starts anew."""
    from ..bundle.place import mark_of, settled, work_folder
    from ..merging.journal import half_done
    from .console import size

    work = work_folder(settled(output))
    mark = mark_of(work)
    if resume or mark is None:
        return
    kind = mark["polymerge"]
    then = "which is done anew; --resume goes on with it" if kind == "merge" else "which is deleted"
    say(f"note: {work} holds {size(half_done(work))} of an interrupted {kind}, {then}")


@contextmanager
def whole_or_not(bundle: Path, name: str, *, adding: bool) -> Iterator[None]:
    """Ctrl-C while an expert comes or goes is one line on standard error, and the exit code 130."""
    before = _holds(bundle, name)
    try:
        yield
    except KeyboardInterrupt:
        from .console import err

        how = _what_became(name, before, _holds(bundle, name), adding=adding)
        err.print(f"interrupted: {bundle}: {how}", markup=False, soft_wrap=True)
        raise SystemExit(STOPPED) from None


def _holds(bundle: Path, name: str) -> bool | None:
    """Whether a bundle has an expert; None where it cannot be opened."""
    from ..bundle.bundle import Bundle
    from ..errors import PolymergeError

    try:
        return name in Bundle.open(bundle).experts
    except (PolymergeError, OSError):
        return None


def _what_became(name: str, before: bool | None, now: bool | None, *, adding: bool) -> str:
    if before is None or now is None:
        return f"it could not be looked at; `polymerge inspect` says whether {name} is in it"
    if now is before:
        return "it is as it was; the same command begins anew"
    return f"{name} was {'added' if adding else 'removed'} before that"


@contextmanager
def interruptible(output: Path, progress: OnProgress | None) -> Iterator[OnProgress]:
    """Gives what is told of every step. Ctrl-C inside is a line or two on standard error, and the exit code 130."""
    last: list[Progress] = []

    def follow(step: Progress) -> None:
        last[:] = [step]
        if progress:
            progress(step)

    try:
        yield follow
    except KeyboardInterrupt:
        from .console import err

        for line in _stopped(output, last[0] if last else None):
            err.print(line, markup=False, soft_wrap=True)
        raise SystemExit(STOPPED) from None


def _stopped(output: Path, last: Progress | None) -> list[str]:
    from ..bundle.place import mark_of, settled, work_folder
    from ..merging.journal import half_done
    from .console import size

    work = work_folder(settled(output))
    early = "interrupted before the first tensor was done; "
    if mark_of(work) is None:
        if last is None:
            return [early + "nothing was written"]
        return [f"interrupted after the merge: {output} is whole, and nothing but its measuring was left out"]
    if last is None:  # a large tensor is written long before it is told, and an earlier run may have left some
        done = f"{early}{size(half_done(work))} lie in {work}"
    else:
        done = f"interrupted: {last.done / last.total:.0%} of the tensors are done and lie in {work}"
    words = [word for word in sys.argv[1:] if word != "--resume"]
    return [done, f"go on: {shlex.join(['polymerge', *words, '--resume'])}"]
