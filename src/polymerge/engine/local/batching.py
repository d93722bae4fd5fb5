"""Continuous batching: requests join the running batch at any step and leave it when they are over.

One thread owns the model. Between two steps it does a slice of what other callers want from the model (embeddings,
scores), drops what nobody waits for, and reads the prompts of newcomers. Knows queues, budgets and failures; does not
know tokens' meaning (`polymerge.engine.answer`) or caches (`polymerge.engine.local.running`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...errors import DeadlineError, EngineBusyError, EngineDownError, ModelError
from ..admission import DEFAULT_LIMITS, Demand, Limits, admit
from ..answer import Answer, Collector, new_answer, taken
from ..base import FloatArray, GenerateRequest, Generation, Pooling, Prompt, Score, ScoreRequest
from ..jobs import Jobs, Work
from ..mixture import members
from ..streaming import EngineState, Listener, Stream, StreamRequest
from .engine import HFEngine
from .fronted import FrontedEngine
from .running import RunningBatch
from .scores import ScoreGroup, grouped

if TYPE_CHECKING:
    from ...model.assignment import RowExpert

logger = logging.getLogger(__name__)

# After a broken step the model is tried so often, with growing pauses, before the engine gives up.
RESTART_PAUSES = (0.0, 0.2, 1.0, 5.0)
# Where memory ran out, one row more is tried after so many turns.
CALM_TURNS = 256
# So long a closing engine waits for a step to end after its answers were given up.
STEP_SECONDS = 1.0
# Tokens of the texts that are embedded or scored between two steps.
SLICE_TOKENS = 512
# Tokens of prompts that are read at a time where no answer waits for it.
FREE_TOKENS = 2048


class BatchingEngine(FrontedEngine):
    """An embedded engine that answers many at once; a `polymerge.engine.StreamingEngine`.

    Args:
        engine: its model belongs to this object from now on.
        limits: of the running batch and of the queue before it.
    """

    def __init__(self, engine: HFEngine, limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__(engine)
        self._limits, self._most_rows, self._calm = limits, limits.max_rows, 0
        self._places = limits.max_rows + limits.max_waiting
        self._waiting: deque[Answer] = deque()
        self._batch = RunningBatch(engine, limits.prefix_tokens)
        self._changed = threading.Condition()
        self._jobs = Jobs()
        self._owed = 0.0  # seconds of answers before other work's next slice: they share the time evenly
        self._status: Any = "ready"
        self._closing = False
        self._next: HFEngine | None = None
        self._leaving: frozenset[str] = frozenset()
        self._thread = threading.Thread(target=self._work, name="polymerge-engine", daemon=True)
        self._thread.start()

    @property
    def experts(self) -> list[str]:
        """The model's, but for those that are leaving."""
        return [name for name in self._engine.experts if name not in self._leaving]

    def replace(self, engine: HFEngine, seconds: float | None = None) -> None:
        """Goes on with another model of the same average, which has more experts or fewer. Nothing is cut: answers of
        an expert that it has not are finished before, and no new ones are begun; all others go on from the tokens that
        they have.

        Raises:
            EngineDownError: the engine has stopped, or is given another model already. DeadlineError: not in time.
        """
        leaving = frozenset(self._engine.experts) - frozenset(engine.experts)
        with self._changed:
            if self._status == "stopped" or self._closing or self._next is not None:
                raise EngineDownError("the engine takes no other model now")
            self._next, self._leaving = engine, leaving
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._next is None, seconds):
                self._next, self._leaving = None, frozenset()
                raise DeadlineError(f"answers of {', '.join(sorted(leaving))} did not end within {seconds:g} s")

    @property
    def state(self) -> EngineState:
        return EngineState(self._status, len(self._batch), len(self._waiting))

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As in the contract; the requests share the running batch with everyone else's, however long the queue is."""
        collectors = [Collector() for _ in requests]
        streams = self._take([StreamRequest(r) for r in requests], collectors, bounded=False)
        return [collector.result(stream.prompt_tokens) for collector, stream in zip(collectors, streams, strict=True)]

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """As in the contract. What is scored at the same time runs a slice at a time, between steps."""
        with self._tokenizing:
            groups = grouped(self._front, requests, self._check)
        work = self._engine.loglikelihood

        def run(items: Sequence[ScoreGroup]) -> list[list[Score]]:
            scores = iter(work([request for group in items for request in group.requests]))
            return [[next(scores) for _ in group.requests] for group in items]

        rows = self._on_worker("score", groups, run, [group.tokens for group in groups])
        places = [place for group in groups for place in group.places]
        ordered = dict(zip(places, itertools.chain.from_iterable(rows), strict=True))
        return [ordered[place] for place in range(len(requests))]

    def embed(
        self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last"
    ) -> FloatArray:
        """As in the contract. Calls that wait at the same time run together, a slice at a time, between steps."""
        import numpy as np

        if not len(prompts):
            return self._engine.embed([], layers=layers, pooling=pooling)
        with self._tokenizing:
            encoded = [self._front.embeddable(prompt) for prompt in prompts]

        def run(items: Sequence[Prompt]) -> list[FloatArray]:
            return list(self._engine.embed(items, layers=layers, pooling=pooling))

        key = ("embed", tuple(layers), pooling)
        rows: list[FloatArray] = self._on_worker(key, encoded, run, [len(ids) for ids in encoded])
        return np.stack(rows)

    def submit(self, requests: Sequence[StreamRequest], listeners: Sequence[Listener]) -> list[Stream]:
        """As in the contract."""
        return self._take(requests, listeners, bounded=True)

    def close(self, seconds: float | None = None) -> None:
        """As in the contract."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._changed:
                late = EngineDownError("the engine was stopped before the answer was whole")
                for answer in [*self._waiting, *self._batch.answers]:
                    answer.fail(late)
                self._jobs.fail(late)
            self._thread.join(STEP_SECONDS)
            if self._thread.is_alive():  # it ends with the process
                logger.warning("the engine was left in the middle of a step")

    def _take(self, requests: Sequence[StreamRequest], listeners: Sequence[Listener], *, bounded: bool) -> list[Stream]:
        answers = [self._answer(*pair) for pair in zip(requests, listeners, strict=True)]
        with self._changed:
            if self._closing or self._status != "ready":
                raise EngineDownError("the engine is " + ("stopping" if self._closing else self._status))
            for answer in answers:  # another model may have come since it was made
                self._check(answer.request.generate.expert)
            if bounded and self._under_way + len(answers) > self._places:
                raise EngineBusyError(f"{self._under_way} requests are under way already; try again later")
            self._waiting.extend(answers)
            self._changed.notify_all()
        return list(answers)

    @property
    def _under_way(self) -> int:
        return sum(not answer.over for answer in {*self._waiting, *self._batch.answers})

    def _answer(self, request: StreamRequest, listener: Listener) -> Answer:
        asked = request.generate
        self._check(asked.expert)
        prompt = self._ids(asked.prompt, asked.expert)
        voice = self._engine.voices.of(asked.expert)  # the worker's own
        matcher = self._engine.grammars.matcher(asked.structure, voice)
        return new_answer(request, prompt, listener, voice=voice, matcher=matcher)

    def _check(self, expert: RowExpert) -> None:
        if gone := self._leaving.intersection(members(expert)):
            raise ModelError(f"expert {min(gone)!r} is being unloaded")
        super()._check(expert)

    def _on_worker(self, key: Any, items: Sequence[Any], run: Work, sizes: Sequence[int]) -> list[Any]:
        """Runs something on the model, slice by slice between steps."""
        if threading.current_thread() is self._thread:
            return list(run(items))
        with self._changed:
            if self._status == "stopped" or not self._thread.is_alive():
                raise EngineDownError("the engine has stopped")
            future = self._jobs.put(key, items, run, sizes)
            self._changed.notify_all()
        return future.result()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or len(self._batch) or self._jobs or self._closing or self._next):
                    self._changed.wait()
                if self._closing and not (self._waiting or len(self._batch) or self._jobs):
                    self._status = "stopped"
                    return
            held = list(self._batch.answers)
            try:
                self._turn()
                self._grow()
            except Exception as error:
                held += [answer for answer in self._batch.answers if answer not in held]
                try:
                    self._recover(error)
                except Exception:
                    logger.exception("the engine could not start again")
                    self._stop(held)

    def _turn(self) -> None:
        """What happens between two steps, and one step."""
        if self._next is not None:
            self._take_next()
        if self._jobs and (self._owed <= 0 or not len(self._batch)):
            began = time.monotonic()
            self._batch.pause()
            self._jobs.run(SLICE_TOKENS)
            self._owed = time.monotonic() - began
        self._drop()
        self._relieve()
        began = time.monotonic()
        self._read()
        if self._batch.rows:
            self._batch.step()
            self._batch.leave()
        self._owed -= time.monotonic() - began

    def _read(self) -> None:
        """One piece of the newcomers' tokens, of all together; who comes meanwhile is read as well, as long as half of
        it is left. The other half is for those whose prompts are longer than that, so that none waits for ever."""
        used = 0
        while True:
            piece = self._limits.chunk_tokens if self._batch.rows else FREE_TOKENS
            left, half = piece - used, piece // 2
            if left >= half:
                self._admit(left - half if self._batch.reads else left)
            if left <= 0 or not self._batch.reads:
                return
            used += self._batch.read(left)
            self._batch.leave()

    def _take_next(self) -> None:
        """Goes over to the other model, unless an answer still needs an expert that it has not."""
        with self._changed:
            answers = [answer for answer in (*self._batch.answers, *self._waiting) if not answer.over]
            needed = {name for answer in answers for name in members(answer.request.generate.expert)}
            if self._next is None or needed & self._leaving:
                return
            self._wait_again(self._batch.clear())
            with self._tokenizing:
                self._face(self._next)
            self._batch = RunningBatch(self._engine, self._limits.prefix_tokens)
            self._next, self._leaving = None, frozenset()
            self._changed.notify_all()

    def _drop(self) -> None:
        """Forgets answers that were cancelled, came too late or have nobody who waits."""
        with self._changed:
            for answer in [*self._batch.answers, *self._waiting]:
                answer.give_up()
            if any(answer.over for answer in self._waiting):
                self._waiting = deque(answer for answer in self._waiting if not answer.over)
        self._batch.leave()

    def _relieve(self) -> None:
        """The youngest answers make room for what the others have become; they go on later."""
        with self._changed:
            youngest = self._batch.youngest(self._limits)
            self._wait_again(youngest)
            self._batch.relieve(youngest, self._limits.cache_tokens)

    def _admit(self, tokens: int) -> None:
        """The next answers for which there is a place join, those together that are read together. Whoever looks for an
        answer finds it in the queue or in the batch.

        Args:
            tokens: that they may have together; one always may.
        """
        running = [answer.demand for answer in self._batch.answers]
        limits = replace(self._limits, prompt_tokens=max(1, min(tokens, self._limits.prompt_tokens)))
        asked: list[int] = []

        def demands() -> Iterator[Demand]:
            for place, answer in enumerate(self._waiting):
                if not self._batch.awaits(answer):
                    asked.append(place)
                    yield self._batch.demand(answer)

        with self._changed:
            places = [asked[number] for number in admit(demands(), running, limits)]
            groups, later = self._batch.apart(taken(self._waiting, places))
            self._wait_again(later)
            for newcomers in groups:
                self._batch.begin(newcomers)

    def _wait_again(self, answers: Sequence[Answer]) -> None:
        """Under the lock: they stand in the queue as they were asked for, and nobody stands there twice."""
        back = [answer for answer in answers if not answer.over]
        if back:
            self._waiting = deque(sorted({*self._waiting, *back}, key=lambda answer: answer.number))

    def _recover(self, error: Exception) -> None:
        """After a broken step every answer goes on from the tokens that it has.

        After two failures an answer runs alone, and one that fails again alone is given up.
        """
        logger.error("a step of the engine failed; the running answers start again where they are", exc_info=error)
        self._status = "restarting"
        with self._changed:
            running = [answer for answer in self._batch.clear() if not answer.over]
            if isinstance(error, torch.OutOfMemoryError) and len(running) > 1:
                torch.cuda.empty_cache()
                self._limits, self._calm = replace(self._limits, max_rows=max(1, len(running) // 2)), 0
            elif len(running) == 1 and running[0].failures:
                running.pop().fail(error)
            for answer in running:
                answer.failures += 1
            self._wait_again(running)
        if any(self._works(pause) for pause in RESTART_PAUSES):
            self._status = "ready"
        else:
            self._stop(())

    def _stop(self, running: Sequence[Answer]) -> None:
        """For good: everyone who waits is told so."""
        with self._changed:
            self._status = "stopped"
            self._closing = True
            for answer in (*running, *self._waiting):
                answer.fail(EngineDownError("the engine has stopped"))
            self._waiting.clear()
            self._jobs.fail(EngineDownError("the engine has stopped"))

    def _grow(self) -> None:
        """After a time without a failure one row more may run, up to as many as before memory ran out."""
        if self._limits.max_rows == self._most_rows:
            return
        self._calm += 1
        if self._calm >= CALM_TURNS:
            self._limits = replace(self._limits, max_rows=self._limits.max_rows + 1)
            self._calm = 0

    def _works(self, pause: float) -> bool:
        """Whether the model can still be used at all."""
        time.sleep(pause)
        try:
            self._engine.embed([[min(self.defaults_of().ends, default=0)]])
        except Exception:
            logger.exception("the model cannot be used")
            return False
        return True
