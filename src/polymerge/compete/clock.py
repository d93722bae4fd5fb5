"""Time and memory of a run: what is used, and what the rest will cost.

Knows seconds, bytes and a rough measure of work. Does not know what is done when they run short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..host import peak_memory
from ..staged.formatter import Question
from ..staged.thought import Thought

TIME_LIMIT = 3600.0  # the competition's, in seconds
WRITTEN = 16.0  # a token that is written costs as much as so many characters that are read


@dataclass(frozen=True)
class Progress:
    """How far a run is: rows done of this phase, seconds since its start (over all tries) and left, peak bytes."""

    phase: Literal["routing", "thinking", "answering"]
    done: int
    total: int
    seconds: float
    seconds_left: float | None
    time_limit: float
    peak_memory: int
    memory_limit: int | None


OnProgress = Callable[[Progress], None]


@dataclass
class Clock:
    """Time used, over all tries, and what the rest will cost, from what was done so far.

    Attributes:
        limit: seconds.
        used: seconds of earlier tries.
        cost, spent: work done in this try (`cost_of`), and the seconds that it took.
    """

    limit: float
    used: float = 0.0
    began: float = field(default_factory=time.monotonic)
    cost: float = 0.0
    spent: float = 0.0

    @property
    def seconds(self) -> float:
        return self.used + time.monotonic() - self.began

    def note(self, cost: float, seconds: float) -> None:
        self.cost, self.spent = self.cost + cost, self.spent + seconds

    def needs(self, cost: float) -> float | None:
        """Seconds for so much work; None while nothing is known."""
        return self.spent / self.cost * cost if self.cost else None

    def spare(self, cost: float) -> float:
        """Seconds until the limit, less those that so much other work will take."""
        return max(0.0, self.limit - self.seconds - (self.needs(cost) or 0.0))

    def allows(self, cost: float) -> bool:
        needed = self.needs(cost)
        return self.seconds + (needed or 0.0) < self.limit


def cost_of(question: Question, thought: Thought | None) -> float:
    """Work of one answer, in characters that are read."""
    read = len(question.text) + (len(thought.text) if thought else 0)
    return read + (sum(map(len, question.choices)) if question.choices else WRITTEN * question.max_new_tokens)


def peak_bytes() -> int:
    """Peak memory so far: the GPU's where there is one, otherwise the process's."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak_memory()
