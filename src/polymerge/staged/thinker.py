"""The first stage: a model that writes down its reasoning.

Knows prompts in, thoughts out, and that a thinker may fail: a failure is a Thought that says why, never an exception.
Does not know what a prompt asks for (`polymerge.staged.templates`) nor who reads the thoughts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..engine.base import Engine, GenerateRequest
from ..errors import MissingExtraError, PolymergeError, SourceError
from .thought import OUT_OF_TIME, Thought, failed

# Thoughts between two looks at the clock.
ROUND = 16
# The temperature of a drawn thought, as in self-consistency (Wang et al. 2022, arXiv 2203.11171).
DRAWN_AT = 0.7


class Thinker(Protocol):
    """A model that thinks.

    Attributes:
        name: for people.
        fingerprint: changes with what its thoughts depend on.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def think(
        self, prompts: Sequence[str], *, max_tokens: int, deadline: float | None = None, seed: int | None = None
    ) -> list[Thought]:
        """One thought a prompt, in their order. `deadline` is a time of `time.monotonic()`; what is not done by then
        comes back as failed. With a seed a thought is drawn, at `DRAWN_AT`; without, it is the likeliest. Raises
        PolymergeError only for a thinker that could never work."""

    def unload(self) -> None:
        """Gives its memory back; the next `think` loads it again."""


class LocalThinker:
    """A thinker that runs in this process, loaded when it is first asked.

    Args:
        load: makes the engine.
    """

    def __init__(self, name: str, load: Callable[[], Engine]) -> None:
        self.name, self._load = name, load
        self._engine: Engine | None = None

    @property
    def fingerprint(self) -> str:
        """The source's name: its weights need not be loaded to tell."""
        return self.name

    def think(
        self, prompts: Sequence[str], *, max_tokens: int, deadline: float | None = None, seed: int | None = None
    ) -> list[Thought]:
        """As in the protocol, the longest prompts first."""
        try:
            engine = self._engine = self._engine or self._load()
        except (SourceError, MissingExtraError):  # not there, or not readable: no later row will fare better
            raise
        except (PolymergeError, RuntimeError, MemoryError) as error:
            return [failed(f"the thinker could not be loaded: {error}")] * len(prompts)
        thoughts = [failed(OUT_OF_TIME)] * len(prompts)
        heat = 0.0 if seed is None else DRAWN_AT
        limits = {"max_new_tokens": max_tokens, "deadline": deadline, "temperature": heat, "seed": seed}
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        for start in range(0, len(order), ROUND):
            if deadline is not None and time.monotonic() >= deadline:
                break
            numbers = order[start : start + ROUND]
            written = self._round(engine, [prompts[number] for number in numbers], limits)
            for number, thought in zip(numbers, written, strict=True):
                thoughts[number] = thought
        return thoughts

    def unload(self) -> None:
        """Drops the engine."""
        self._engine = None
        _collect()

    def _round(self, engine: Engine, prompts: Sequence[str], limits: dict[str, Any]) -> list[Thought]:
        try:
            requests = [GenerateRequest(_prompt(engine, prompt), **limits) for prompt in prompts]
            generations = engine.generate(requests)
        except (PolymergeError, RuntimeError, MemoryError) as error:
            if len(prompts) == 1:
                return [failed(str(error) or type(error).__name__)]
            return [thought for prompt in prompts for thought in self._round(engine, [prompt], limits)]
        return [Thought(g.text.strip(), g.prompt_tokens, g.tokens, g.finish) for g in generations]


def _prompt(engine: Engine, text: str) -> str | list[int]:
    """A conversation of one turn; the bare text for a model that knows no turns, so that it goes on with it."""
    ids = engine.chat_prompt([{"role": "user", "content": text}])
    return text if ids == engine.encode(f"{text}\n") else ids


def _collect() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
