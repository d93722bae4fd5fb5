"""Decoding steps that are captured once and replayed: on a GPU a step is bound by the launches of its kernels.

A shape (rows and columns, both rounded up) that lasts is captured, held against the eager step of the same rows, and
used from then on, whoever the rows' experts are. Where a model or a batch does not allow it the eager step is taken;
why not is logged once. Knows shapes and when they are worth it; what such a step is, is `polymerge.model.step`'s.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...model.step import FixedStep, Row
from .cache import GROWTH, RunningCache
from .loaded import LoadedModel

if TYPE_CHECKING:
    from ...model.assignment import RowExpert

logger = logging.getLogger(__name__)

# A shape is captured after so many steps of it: a capture costs a few.
PATIENCE = 8
# What a captured step's logits may be away from the eager one's, by the norm of a row: kernels of other shapes round
# otherwise, by 0.05 for random bfloat16 weights of 32 layers. What would be wrong in float32 is held by tests.
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_16 = 0.1
# After a capture that failed one is tried again so many eager steps later; after so many failures none is.
LATER, ATTEMPTS = 256, 4


def objection(engine: LoadedModel) -> str | None:
    """Why steps of a model cannot have fixed shapes; None where they can."""
    layers = DynamicCache(config=engine.hf.config).layers
    if not all(type(layer) is DynamicLayer for layer in layers):
        return "a layer looks at a window of the columns"
    reason: str | None = engine.model.step_objection() if engine.is_mixed else None
    return reason


class StepGraphs:
    """Of one running batch."""

    def __init__(self, engine: LoadedModel) -> None:
        self._engine = engine
        self._captures = engine.device.type == "cuda"
        self._on = engine.steps == "fixed" or (engine.steps == "auto" and self._captures)
        if self._on and (reason := objection(engine)) is not None:
            self._give_up(reason)
        self._steps: dict[tuple[int, int, bool], FixedStep] = {}
        self._seen: Counter[tuple[int, int, bool]] = Counter()
        self._failures, self._rest = 0, 0  # steps before a capture is tried again
        self._pool: Any = None

    def __len__(self) -> int:
        """Shapes that are captured."""
        return len(self._steps)

    def clear(self) -> None:
        """Forgets all, as the buffers of the cache are about to change."""
        if self._steps:
            self._steps, self._pool = {}, None
            self._seen.clear()

    def step(
        self,
        cache: RunningCache,
        experts: Sequence[RowExpert],
        latest: Sequence[int],
        eager: Callable[[], Tensor],
        pause: Callable[[], None],
    ) -> Tensor:
        """Logits [B, V] after the latest token of every row.

        Args:
            cache: that has room for one column more.
            eager: makes them in the ordinary way.
            pause: takes the rows' experts off the model.
        """
        if not self._on or (numbers := self._numbers(experts)) is None:
            return eager()
        column = cache.extent.end
        lengths = cache.lengths
        rows = [Row(*row) for row in zip(latest, lengths, cache.starts, numbers, strict=True)]
        mixed = any(number != self._average for number in numbers)
        shape = (2 ** (len(rows) - 1).bit_length(), -(-(column + 1) // GROWTH) * GROWTH, mixed)
        if shape in self._steps:
            pause()
            cache.scribbled = True
            return self._steps[shape].run(rows, column)
        self._seen[shape] += 1
        self._rest -= 1
        logits = eager()
        if self._seen[shape] < PATIENCE or self._rest > 0:
            return logits
        pause()
        self._capture(cache, shape, rows, column, logits)
        return logits if shape in self._steps else eager()  # what a wrong step wrote into the cache is written anew

    def _capture(
        self, cache: RunningCache, shape: tuple[int, int, bool], rows: Sequence[Row], column: int, expected: Tensor
    ) -> None:
        state = self._engine.model.assignment if self._engine.is_mixed else None
        try:
            step = FixedStep(self._engine.hf, cache.views(*shape[:2]), state, mixed=shape[2])
            cache.scribbled = True
            if self._captures:
                pool = self._pool or torch.cuda.graph_pool_handle()
                self._pool = None  # a capture that fails may leave one that takes no other
                step.capture(rows, column, pool)
                self._pool = pool
            distance = _distance(step.run(rows, column), expected)
        except Exception as error:  # a driver and a model's own code raise what they like
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return
        if not distance <= TOLERANCE.get(expected.dtype, TOLERANCE_16):  # not a number, too
            self._give_up(f"its logits are {distance:.2g} away from the eager step's")
            return
        self._steps[shape], self._failures = step, 0
        logger.info("decoding steps of %d rows and %d columns are replayed", *shape[:2])

    def _fail(self, reason: str) -> None:
        """Memory may have been short, or another thread in the way."""
        self._failures += 1
        if self._failures == ATTEMPTS:
            self._give_up(reason)
            return
        self._rest = LATER
        logger.info("a decoding step could not be captured, and is tried again later: %s", reason)

    def _give_up(self, reason: str) -> None:
        self._on, self._steps, self._pool = False, {}, None
        logger.info("decoding steps are not replayed: %s", reason)

    @property
    def _average(self) -> int:
        return len(self._engine.experts)

    def _numbers(self, experts: Sequence[RowExpert]) -> list[int] | None:
        """Of every row's expert; None where one is a mixture."""
        known = {name: number for number, name in enumerate([*self._engine.experts, "average"])}
        named = ["average" if expert is None else expert for expert in experts]
        return [known[name] for name in named if isinstance(name, str)] if not _mixtures(named) else None


def _mixtures(experts: Sequence[Any]) -> bool:
    return not all(isinstance(expert, str) for expert in experts)


def _distance(got: Tensor, expected: Tensor) -> float:
    """Of the row that is furthest away, in shares of its norm."""
    finite = torch.isfinite(expected)
    got, expected = (torch.where(finite, logits, 0).float() for logits in (got, expected))
    return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
