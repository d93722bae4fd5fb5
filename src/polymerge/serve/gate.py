"""How many requests may be under way: the bound of everything that touches the model, held before any work is done.

Knows places; does not know requests or engines. Who of those inside goes next is the engine's to say
(`polymerge.engine.admission`, `polymerge.engine.jobs`). Used from the event loop alone.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import EngineBusyError


class Gate:
    """So many places, one for each answer that is asked for; a text to embed or to route takes one too.

    Attributes:
        most: places that there are.
        held: those that are taken.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def check(self, places: int = 1) -> None:
        """Takes nothing. Raises EngineBusyError: so many are not free."""
        if self.held + places > self.most:
            raise EngineBusyError(f"{self.held} requests are under way already; try again later")

    def take(self, places: int) -> Callable[[], None]:
        """Takes places. Returns what gives them back; calling it again does nothing.

        Raises:
            EngineBusyError: so many are not free.
        """
        self.check(places)
        self.held += places
        left = [places]

        def give_back() -> None:
            self.held -= left[0]
            left[0] = 0

        return give_back
