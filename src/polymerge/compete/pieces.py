"""From questions to answers against the clock, piece by piece.

All thoughts come first, then all answers, in pieces of like rows (route, kind, length). Every finished piece is in the
journal, and the pieces do not depend on where a run was stopped: killed and started again, it ends in the same bytes.
When time or memory runs short, what is left is answered directly, which is cheap, rather than lost.

Knows questions, not files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from ..errors import PolymergeError
from ..staged.formatter import Question
from ..staged.pipeline import Pipeline, Response, Step
from ..staged.thought import Thought
from .clock import Clock, OnProgress, Progress, cost_of, peak_bytes
from .expected import Expected, OnPlan, expected
from .flaws import flaw_of
from .journal import Journal

OnError = Literal["fail", "skip"]
PIECE = 32  # rows between two notes in the journal
THOUGHT_SHARE = 0.5  # of the time limit; what is thought of by then is used, the rest is answered directly
SHORT_OF_TIME, SHORT_OF_MEMORY = "time ran short", "memory ran short"


class Run:
    """One run's state: what is known of every row so far."""

    def __init__(
        self,
        pipeline: Pipeline,
        questions: Sequence[Question],
        journal: Journal,
        time_limit: float,
        memory_limit: int | None,
        on_error: OnError,
        progress: OnProgress | None,
        on_plan: OnPlan | None,
    ) -> None:
        self.pipeline, self.questions, self.journal = pipeline, questions, journal
        self.memory_limit, self.on_error, self.progress = memory_limit, on_error, progress
        used = max((entry["seconds"] for entry in journal.lines), default=0.0)
        self.clock = Clock(time_limit, used)
        self.on_plan = on_plan
        self.steps: list[Step] = []
        self.expected: Expected | None = None

    def answers(self) -> list[dict[str, Any]]:
        """One note a question: prediction, stage, reason and expert."""
        self.steps = steps = self._steps()
        pieces = _pieces(steps)
        if self.on_plan:
            self.expected = self._expected(pieces)
            self.on_plan(self.expected)
        thoughts = self._think(steps, pieces)
        if self.pipeline.thinker:  # its memory is of more use to the answers
            self.pipeline.thinker.unload()
        return self._answer(steps, pieces, thoughts)

    def _expected(self, pieces: Sequence[Sequence[int]]) -> Expected:
        def without(kind: str) -> list[Step]:
            done = self._done(kind)
            return [self.steps[row] for number, rows in enumerate(pieces) if number not in done for row in rows]

        thinks = self.pipeline.thinker is not None and not self._short_of_memory()  # else it is not loaded
        return expected(
            self.pipeline, without("answers"), [s for s in without("thoughts") if s.version and thinks], self.clock,
            piece=PIECE, thinking_until=self._deadline(), memory_limit=self.memory_limit,
        )  # fmt: skip

    def _done(self, kind: str) -> dict[int, Any]:
        return {entry["piece"]: entry[kind] for entry in self.journal.lines if kind in entry}

    def _note(self, kind: str, piece: int, value: Any) -> None:
        self.journal.add({"piece": piece, kind: value, "seconds": round(self.clock.seconds, 3)})

    def _steps(self) -> list[Step]:
        done, steps = self._done("steps"), list[Step]()
        for number, start in enumerate(range(0, len(self.questions), PIECE)):
            questions = self.questions[start : start + PIECE]
            if number not in done:
                routed = self.pipeline.steps(questions)
                done[number] = [[step.expert, step.field, step.version, step.reason] for step in routed]
                self._note("steps", number, done[number])
                done_rows, all_rows = start + len(questions), len(self.questions)
                if self.pipeline.routes:
                    self._show("routing", done_rows, all_rows, 0.0 if done_rows == all_rows else None)
            for question, (expert, area, version, reason) in zip(questions, done[number], strict=True):
                steps.append(Step(question, expert, area, None, version, reason))
        return steps

    def _think(self, steps: Sequence[Step], pieces: Sequence[Sequence[int]]) -> list[Thought | None]:
        thoughts: list[Thought | None] = [None] * len(steps)
        wanted = [number for number, piece in enumerate(pieces) if any(steps[row].version for row in piece)]
        done, began, deadline = self._done("thoughts"), time.monotonic(), self._deadline()
        total, finished, resumed = sum(len(pieces[n]) for n in wanted), 0, 0
        for number in wanted:
            rows = pieces[number]
            if number in done:
                piece_thoughts = [Thought(**thought) if thought else None for thought in done[number]]
                resumed += len(rows)
            else:
                piece_thoughts = self._thoughts([steps[row] for row in rows], deadline)
                self._note("thoughts", number, [asdict(thought) if thought else None for thought in piece_thoughts])
            finished += len(rows)
            for row, thought in zip(rows, piece_thoughts, strict=True):
                thoughts[row] = thought
            rate = (time.monotonic() - began) / max(1, finished - resumed)
            self._show("thinking", finished, total, rate * (total - finished))
        return thoughts

    def _thoughts(self, steps: Sequence[Step], deadline: float) -> list[Thought | None]:
        if self._short_of_memory() and self.pipeline.thinker:
            self.pipeline.thinker.unload()
            return [Thought("", finish="failed", error=SHORT_OF_MEMORY) if step.version else None for step in steps]
        return self.pipeline.think(steps, deadline=deadline)

    def _deadline(self) -> float:
        thought_seconds = self.pipeline.settings.thought_seconds or float("inf")
        return time.monotonic() + min(self.clock.limit * THOUGHT_SHARE, thought_seconds) - self.clock.seconds

    def _answer(
        self, steps: Sequence[Step], pieces: Sequence[Sequence[int]], thoughts: Sequence[Thought | None]
    ) -> list[dict[str, Any]]:
        notes: dict[int, dict[str, Any]] = {}
        done, finished = self._done("answers"), 0
        costs = [cost_of(step.question, None) for step in steps]
        left = sum(costs)
        for number, rows in enumerate(pieces):
            left -= sum(costs[row] for row in rows)
            if number not in done:
                done[number] = self._piece([steps[row] for row in rows], [thoughts[row] for row in rows], left)
                self._note("answers", number, done[number])
            notes |= dict(zip(rows, done[number], strict=True))
            finished += len(rows)
            self._show("answering", finished, len(steps), self.clock.needs(left))
        return [notes[row] for row in range(len(steps))]

    def _piece(self, steps: Sequence[Step], thoughts: Sequence[Thought | None], left: float) -> list[dict[str, Any]]:
        cost = sum(cost_of(s.question, t) for s, t in zip(steps, thoughts, strict=True))
        if not self.clock.allows(cost + left):
            steps = [step.direct(SHORT_OF_TIME) if step.version else step for step in steps]
            cost = sum(cost_of(step.question, None) for step in steps)
        began = time.monotonic()
        answers = self._respond(steps, thoughts, began + self.clock.spare(left))
        self.clock.note(cost, time.monotonic() - began)
        return answers

    def _respond(
        self, steps: Sequence[Step], thoughts: Sequence[Thought | None], deadline: float
    ) -> list[dict[str, Any]]:
        """A piece that fails is tried row by row, so that one row cannot take the others with it."""
        try:
            return [_noted(response) for response in self.pipeline.answer(steps, thoughts, deadline=deadline)]
        except PolymergeError as error:
            if self.on_error == "fail":
                raise
            if len(steps) == 1:
                return [{"failed": str(error), "text": "", "index": None}]
        pairs = zip(steps, thoughts, strict=True)
        return [note for step, thought in pairs for note in self._respond([step], [thought], deadline)]

    def _short_of_memory(self) -> bool:
        return self.memory_limit is not None and peak_bytes() > self.memory_limit

    def _show(self, phase: Any, done: int, total: int, left: float | None) -> None:
        if self.progress:
            clock = self.clock
            self.progress(
                Progress(phase, done, total, clock.seconds, left, clock.limit, peak_bytes(), self.memory_limit)
            )


def _pieces(steps: Sequence[Step]) -> list[list[int]]:
    """Rows of like route, kind and length, the longest first; a piece never holds two routes or kinds."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for row, step in enumerate(steps):
        groups.setdefault((json.dumps(step.expert, sort_keys=True), bool(step.question.choices)), []).append(row)
    pieces = []
    for _, rows in sorted(groups.items()):
        rows.sort(key=lambda row: (-len(steps[row].question.text), row))
        pieces += [rows[start : start + PIECE] for start in range(0, len(rows), PIECE)]
    return pieces


def _noted(response: Response) -> dict[str, Any]:
    return {
        "text": response.text,
        "index": response.index,
        "stage": response.stage,
        "reason": response.reason,
        "expert": response.expert,
        "flaw": flaw_of(response.text, response.finish) if response.index is None else None,
    }
