"""A list of answers by the running batch: whoever is over makes room for the next.

Knows who waits and what a batch may hold. Does not know requests or text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from ...errors import ModelError
from ..admission import Limits, admit
from ..answer import Answer, taken
from .loaded import LoadedModel
from .running import RunningBatch

# Reading one prompt costs all others a step, so newcomers wait until this share of the batch is free for them.
REFILL = 0.25


def answer_all(model: LoadedModel, answers: Sequence[Answer]) -> None:
    """Makes all answers. A batch that runs out of memory goes on as halves.

    Raises:
        ModelError: one answer alone does not fit the memory.
    """
    run = _Run(model, answers)
    try:
        run.go()
    finally:
        run.batch.clear()


class _Run:
    """The longest answers first: running out of memory shows at once, and like lengths share a batch."""

    def __init__(self, model: LoadedModel, answers: Sequence[Answer]) -> None:
        self.batch = RunningBatch(model)
        self._waiting = deque(sorted(answers, key=lambda answer: -answer.longest))
        rows, tokens = max(1, len(answers)), model.batch_tokens
        self._limits = Limits(max_rows=rows, max_waiting=rows, cache_tokens=tokens, prompt_tokens=tokens)
        self._filled = 0  # rows after the latest newcomers joined

    def go(self) -> None:
        while self._waiting or len(self.batch):
            for answer in self.batch.answers:
                answer.give_up()
            self.batch.leave()
            self._waiting.extendleft(reversed(self.batch.relieve(self._limits)))
            newcomers = self._newcomers()
            if not self._went_on(newcomers):
                self._halve(newcomers)
            self.batch.leave()

    def _newcomers(self) -> list[Answer]:
        if len(self.batch) > (1 - REFILL) * self._filled:
            return []
        places = admit((a.demand for a in self._waiting), [a.demand for a in self.batch.answers], self._limits)
        self._filled = len(self.batch) + len(places)
        newcomers = taken(self._waiting, places)
        for answer in newcomers:
            answer.give_up()
        return [answer for answer in newcomers if not answer.over]

    def _went_on(self, newcomers: Sequence[Answer]) -> bool:
        """Newcomers join, or everyone gets a token. False where the memory does not hold it."""
        try:
            if newcomers:
                self.batch.join(newcomers)
            else:
                self.batch.step()
        except torch.OutOfMemoryError:
            return False
        return True

    def _halve(self, newcomers: Sequence[Answer]) -> None:
        """All answers go back, to go on from the tokens that they have, half as many at a time."""
        back = [answer for answer in dict.fromkeys([*self.batch.clear(), *newcomers]) if not answer.over]
        torch.cuda.empty_cache()
        if len(back) == 1:
            raise ModelError("out of memory on one request; a shorter prompt or a smaller model is needed")
        self._limits = replace(self._limits, max_rows=max(1, len(back) // 2))
        self._waiting.extendleft(sorted(back, key=lambda answer: answer.longest))
        self._filled = 0
