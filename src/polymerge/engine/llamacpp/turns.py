"""Whose turn it is: llama.cpp makes batches of requests of one adapter alone, so experts take turns.

A decision that is data; who asks acts on it. Knows names and times. Does not know queues, requests or servers.

The rule. A turn belongs to one expert. When nothing runs, the next turn goes to the expert whose oldest waiting request
is oldest. For `TURN_SECONDS` of it, or as long as nobody else waits, the expert's new requests join the running ones.
Then, if others wait, none joins any more; after as long again those that can go on later are set aside (they wait like
a request that came now), and the rest runs to its end. So a request waits for at most two of these times for each
expert before it, beside answers that cannot be set aside (yet: `reading.LEAST_TOKENS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TURN_SECONDS = 3.0


@dataclass(frozen=True)
class Turn:
    """An expert's turn, and when it began. The average has one as an expert has."""

    name: str
    began: float


@dataclass(frozen=True)
class Decision:
    """What shall happen.

    Attributes:
        turn: whose turn it is now; None when nothing runs and nobody waits.
        admit: that expert's waiting requests join.
        set_aside: its running answers that can go on later make room.
    """

    turn: Turn | None
    admit: bool = False
    set_aside: bool = False


def decide(
    turn: Turn | None, running: int, waiting: Mapping[str, float], now: float, *, seconds: float = TURN_SECONDS
) -> Decision:
    """What shall happen now.

    Args:
        running: answers of the turn that are being made.
        waiting: expert -> when its oldest waiting request came.
    """
    if turn is None or not running:
        oldest = min(waiting, key=lambda name: waiting[name], default=None)
        return Decision(Turn(oldest, now) if oldest is not None else None, admit=oldest is not None)
    others = any(name != turn.name for name in waiting)
    age = now - turn.began
    if not others or age < seconds:
        return Decision(turn, admit=True)
    return Decision(turn, set_aside=age >= 2 * seconds)
