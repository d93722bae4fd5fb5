"""What callers' threads ask an engine about tokens, while another thread runs its model.

A tokenizer changes its settings while it encodes, so these threads have one of their own, and a lock. Knows tokenizers,
templates and which experts there are; does not know batches.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...model.assignment import Assignment
from ..base import Message, Prompt
from ..defaults import GenerationDefaults
from ..wrappers.forwarding import ForwardingEngine
from .engine import HFEngine

if TYPE_CHECKING:
    from ...model.assignment import RowExpert


class FrontedEngine(ForwardingEngine):
    """The words' side of an embedded engine whose model belongs to a thread."""

    _engine: HFEngine

    def __init__(self, engine: HFEngine) -> None:
        super().__init__(engine)
        self._tokenizing = threading.Lock()
        self._face(engine)

    def _face(self, engine: HFEngine) -> None:
        """Answers for this model from now on."""
        self._engine, self._front = engine, copy.copy(engine)
        self._front.voices = engine.voices.apart()
        self._checks = Assignment(engine.experts, torch.device("cpu"))

    @property
    def model(self) -> Any:
        """The model, which belongs to another thread: only what does not change with a batch may be looked at."""
        return self._engine.model

    def max_length_of(self, expert: RowExpert = None) -> int:
        """As in the contract. Takes no lock: an event loop may ask."""
        return self._engine.max_length_of(expert)

    def defaults_of(self, expert: RowExpert = None) -> GenerationDefaults:
        """As in the contract. Takes no lock: an event loop may ask."""
        return self._engine.defaults_of(expert)

    def encode(self, text: str, *, special: bool = True, expert: RowExpert = None) -> list[int]:
        """As in the contract."""
        with self._tokenizing:
            return self._front.encode(text, special=special, expert=expert)

    def decode(self, ids: Sequence[int], *, expert: RowExpert = None) -> str:
        """As in the contract."""
        with self._tokenizing:
            return self._front.decode(ids, expert=expert)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        expert: RowExpert = None,
        go_on: bool = False,
        tools: Sequence[Message] = (),
    ) -> list[int]:
        """As in the contract."""
        with self._tokenizing:
            return self._front.chat_prompt(messages, expert=expert, go_on=go_on, tools=tools)

    def chat_template_of(self, expert: RowExpert = None) -> str | None:
        """As in the contract. Takes no lock: an event loop may ask."""
        return self._front.chat_template_of(expert)

    def _ids(self, prompt: Prompt, expert: RowExpert) -> list[int]:
        """Token ids of a prompt. Those that are ids already need no tokenizer and no lock."""
        if isinstance(prompt, str):
            with self._tokenizing:
                return self._front.ids(prompt, expert)
        return self._front.ids(prompt, expert)

    def _check(self, expert: RowExpert) -> None:
        """Raises ModelError for an expert that there is not, without the model's own state."""
        if self._engine.experts:
            self._checks.check(expert)
        else:
            self._front.check_expert(expert)
