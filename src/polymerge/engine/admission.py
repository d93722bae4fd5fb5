"""What a running batch may hold, and which of the waiting requests join it now: a decision that is data.

Knows numbers of tokens and limits. Does not know queues, caches or models; who asks acts on the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from ..errors import PolymergeError

# A request that was in more broken batches than this is run alone: one that breaks alone is the one at fault.
FAILURES_TOGETHER = 1
# An answer joins where there is room for so many tokens more than it has, or for all that it may get.
HEADROOM = 64
# So many later requests may join a batch that has no room for an earlier one.
PATIENCE = 32


@dataclass(frozen=True)
class Limits:
    """Bounds of an engine that answers many at once.

    Attributes:
        max_rows: answers in the running batch.
        max_waiting: requests that wait for a place; more are refused.
        cache_tokens: tokens in the caches of all rows, padding included: rows times the longest one. Where answers grow
            beyond it the youngest go back to the queue. One request always fits.
        prompt_tokens: padded tokens of prompts that are read in one batch. One prompt always fits.
        chunk_tokens: of prompts that are read between two steps of running answers, of all together: the answers wait
            for no more than that.
        prefix_tokens: of prompts' beginnings that are remembered, within `cache_tokens` and only as far as the rows
            leave room; 0 remembers none.

    Raises:
        PolymergeError: a limit under 1.
    """

    max_rows: int = 32
    max_waiting: int = 256
    cache_tokens: int = 32768
    prompt_tokens: int = 2048
    chunk_tokens: int = 256
    prefix_tokens: int = 32768

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name != "prefix_tokens")
            if value < least:
                raise PolymergeError(f"{field.name}: must be at least {least}, not {value}")


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Demand:
    """What one request takes of a batch.

    Attributes:
        unread: tokens that it has when it joins: its prompt, and what it had made before a step broke.
        longest: tokens of prompt and answer at most.
        failures: batches that broke while it ran in them.
        scores_prompt: its prompt's tokens are scored, so it is read with others of that kind alone.
        passed: requests that came later and joined before it.
        number: grows with the time at which it came.
        known: of its first tokens, so many are remembered and are not read again.
    """

    unread: int
    longest: int
    failures: int = 0
    scores_prompt: bool = False
    passed: int = 0
    number: int = 0
    known: int = 0

    @property
    def soon(self) -> int:
        """Tokens that it has room for when it joins."""
        return min(self.longest, self.unread + HEADROOM)

    @property
    def alone(self) -> bool:
        return self.failures > FAILURES_TOGETHER


def padded(tokens: Sequence[int]) -> int:
    """Tokens that rows of these lengths take together, as each is padded to the longest."""
    return len(tokens) * max(tokens, default=0)


def admit(waiting: Iterable[Demand], running: Sequence[Demand], limits: Limits) -> list[int]:
    """Which of the waiting requests join the running batch now: their places in the queue, in order.

    The first that waits goes first. One that the batch has no room for is overtaken by those behind it that fit, as
    often as `PATIENCE` says; then nobody joins before it does, so that the batch empties for it. One that has room and
    is only not read in the same pass is not overtaken. Into an empty batch one request always goes, whatever it takes.
    """
    places: list[int] = []
    newcomers: list[Demand] = []
    for place, demand in enumerate(waiting):
        rows = [*running, *newcomers]
        if not rows or _fits([*rows, demand], limits):
            if not _read_together([*newcomers, demand], limits):
                break
            places.append(place)
            newcomers.append(demand)
        elif len(rows) >= limits.max_rows or demand.passed >= PATIENCE:
            break
    return places


def surplus(running: Sequence[Demand], limits: Limits) -> int | None:
    """Which of the running answers goes back to the queue: the youngest; None where all have room for what they have.

    The oldest goes on to its end, so that none waits for ever.
    """
    if len(running) < 2 or padded([row.unread for row in running]) <= limits.cache_tokens:
        return None
    return max(range(len(running)), key=lambda place: running[place].number)


def _fits(rows: Sequence[Demand], limits: Limits) -> bool:
    """Whether these can be one batch."""
    return (
        len(rows) <= limits.max_rows
        and padded([row.soon for row in rows]) <= limits.cache_tokens
        and not any(row.alone for row in rows)
    )


def _read_together(newcomers: Sequence[Demand], limits: Limits) -> bool:
    """Whether the prompts of these can be read in one pass."""
    return len(newcomers) == 1 or (
        padded([row.unread - row.known for row in newcomers]) <= limits.prompt_tokens
        and len({row.scores_prompt for row in newcomers}) == 1
    )
