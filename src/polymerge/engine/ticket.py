"""For whom a thread asks an engine: whether anybody still waits for it, and until when.

A call of an engine blocks its thread, and stands below routers, stages and thinkers that know nothing of clients. So
the ticket goes with the thread, and an engine takes it up where it is asked. Does not know engines or requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from ..errors import DeadlineError


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Ticket:
    """What a piece of work is worth.

    Attributes:
        wanted: whether anybody still waits for it.
        due: a time of `time.monotonic()` after which nobody does; None is never.
    """

    wanted: Callable[[], bool] = _always
    due: float | None = None

    @property
    def over(self) -> bool:
        """Whether the work is not worth doing any more."""
        return not self.wanted() or (self.due is not None and time.monotonic() > self.due)


FOR_EVER = Ticket()
_current: ContextVar[Ticket] = ContextVar("polymerge_ticket", default=FOR_EVER)


def current_ticket() -> Ticket:
    """This thread's; without one, work is always wanted."""
    return _current.get()


@contextmanager
def asking(ticket: Ticket) -> Iterator[None]:
    """What this thread asks engines inside is for this ticket."""
    before = _current.set(ticket)
    try:
        yield
    finally:
        _current.reset(before)


def not_wanted() -> DeadlineError:
    """What a thread hears whose work was dropped."""
    return DeadlineError("nobody waits for this any more, or it came too late")
