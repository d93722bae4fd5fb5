"""What a run is expected to take, told before it begins: tokens are counted, speed is timed on a few rows.

Knows the rows that are left and a pipeline to time. Does not know what is done when it is too much (`run.py`). The
timing changes no answer: what it writes is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import PolymergeError
from ..staged.endpoint import EndpointThinker
from ..staged.pipeline import Pipeline, Response, Step
from .clock import Clock, peak_bytes

TIMED, SHARE = 8, 16  # rows of a kind that are timed: one in SHARE, at most TIMED
WRITTEN = 8  # tokens that are written to time one
Work = tuple[int, int]


@dataclass(frozen=True)
class Expected:
    """What the rest of a run takes.

    Attributes:
        rows: to answer. read: tokens of prompts, thoughts and choices. written: tokens of answers, at most.
        thoughts, thought_tokens: rows to think about, and tokens that these write at most.
        seconds: about, if every text is as long as it may be; None where no row could be timed.
        seconds_left: of the time limit. memory: about, in bytes, at the peak.
    """

    rows: int
    read: int
    written: int
    thoughts: int
    thought_tokens: int
    seconds: float | None
    seconds_left: float
    memory: int
    memory_limit: int | None

    @property
    def fits(self) -> bool:
        """Whether it is expected to end within its limits."""
        in_time = self.seconds is None or self.seconds <= self.seconds_left
        return in_time and (self.memory_limit is None or self.memory <= self.memory_limit)


OnPlan = Callable[[Expected], None]


def expected(
    pipeline: Pipeline,
    left: Sequence[Step],
    unthought: Sequence[Step],
    clock: Clock,
    *,
    piece: int,
    thinking_until: float,
    memory_limit: int | None,
) -> Expected:
    """Counts and times.

    Args:
        left: rows without an answer. unthought: those that shall be thought about and were not yet.
        piece: rows that are answered together.
        thinking_until: a time of `time.monotonic()` at which thinking is over.
    """
    tokens = pipeline.settings.thought_tokens
    work = pipeline.work(left)
    thinking = sum(bool(step.version) for step in left) * tokens
    before, rows_timed = peak_bytes(), max(1, *(len(_sample(range(n))) for n in _kinds(left)))
    try:
        answering = _answering(pipeline, left, work, thinking)
        seconds: float | None = answering + _thinking(pipeline, unthought, tokens, thinking_until)
    except PolymergeError:  # the run says which row it is
        seconds = None
    grown = (peak_bytes() - before) * min(piece, max(1, len(left))) // rows_timed
    return Expected(
        rows=len(left),
        read=sum(read for read, _ in work) + thinking,
        written=sum(written for _, written in work),
        thoughts=len(unthought),
        thought_tokens=len(unthought) * tokens,
        seconds=seconds,
        seconds_left=max(0.0, clock.limit - clock.seconds),
        memory=before + grown,
        memory_limit=memory_limit,
    )


def _kinds(left: Sequence[Step]) -> tuple[int, int]:
    scored = sum(step.question.scored for step in left)
    return scored, len(left) - scored


def _sample(rows: Sequence[int]) -> list[int]:
    """Places of a few rows, evenly apart, the first among them."""
    count = min(TIMED, -(-len(rows) // SHARE))
    return [rows[number * len(rows) // count] for number in range(count)]


def _answering(pipeline: Pipeline, left: Sequence[Step], work: Sequence[Work], more: int) -> float:
    """Seconds of all answers, with `more` tokens to read than their direct prompts have."""
    total, longest_first = 0.0, sorted(range(len(left)), key=lambda row: -work[row][0])
    for scored in (True, False):
        rows = [row for row in longest_first if left[row].question.scored == scored]
        if not rows:
            continue
        sample = _sample(rows)
        _timed(pipeline, [left[sample[-1]]], 1)  # the first of anything takes longer
        once, responses = _timed(pipeline, [left[row] for row in sample], 1)
        read, write = once / max(1, sum(work[row][0] for row in sample)), 0.0
        if not scored:
            longer, later = _timed(pipeline, [left[row] for row in sample], 1 + WRITTEN)
            write = _each(longer - once, _written(later) - _written(responses))
        share = more * len(rows) / len(left)
        total += read * (share + sum(work[row][0] for row in rows)) + write * sum(work[row][1] for row in rows)
    return total


def _timed(pipeline: Pipeline, steps: Sequence[Step], tokens: int) -> tuple[float, list[Response]]:
    short = [replace(s.direct(""), question=replace(s.question, max_new_tokens=tokens)) for s in steps]
    began = time.monotonic()
    responses = pipeline.answer(short, [None] * len(short))
    return time.monotonic() - began, responses


def _written(responses: Sequence[Response]) -> int:
    return sum(response.tokens for response in responses)


def _thinking(pipeline: Pipeline, steps: Sequence[Step], tokens: int, until: float) -> float:
    """Seconds of all thoughts; no more than there are until thinking is over. An endpoint is not timed: its calls may
    be paid for."""
    if not steps:
        return 0.0
    room = max(0.0, until - time.monotonic())
    if isinstance(pipeline.thinker, EndpointThinker):
        return room
    sample = [steps[number] for number in _sample(range(len(steps)))]
    seconds, written = [], []
    for budget in (1, 1, 1 + WRITTEN):  # the first loads the thinker
        began = time.monotonic()
        thoughts = pipeline.think(sample, deadline=until, tokens=budget)
        seconds.append(time.monotonic() - began)
        written.append(sum(thought.tokens for thought in thoughts if thought))
    if written[2] <= written[1]:  # it failed, or ends at once: nothing is known
        return room
    write = _each(seconds[2] - seconds[1], written[2] - written[1])
    read = max(0.0, seconds[1] - write * written[1]) / len(sample)
    return min(room, len(steps) * (read + write * tokens))


def _each(seconds: float, tokens: int) -> float:
    return max(0.0, seconds) / tokens if tokens > 0 else 0.0
