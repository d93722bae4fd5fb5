"""What engines that stand before another engine share: they pass on whatever they do not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..base import Engine, FloatArray, Message, Pooling, Prompt

if TYPE_CHECKING:
    from ...model.assignment import RowExpert


class ForwardingEngine:
    """All of the contract but `generate` and `loglikelihood`, answered by the engine behind it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def experts(self) -> list[str]:
        """The engine's."""
        return self._engine.experts

    @property
    def max_length(self) -> int:
        """The engine's."""
        return self._engine.max_length

    @property
    def depth(self) -> int:
        """The engine's."""
        return self._engine.depth

    @property
    def fingerprint(self) -> str:
        """The engine's."""
        return self._engine.fingerprint

    def max_length_of(self, expert: RowExpert = None) -> int:
        """The engine's."""
        return self._engine.max_length_of(expert)

    def encode(self, text: str, *, special: bool = True, expert: RowExpert = None) -> list[int]:
        """The engine's."""
        return self._engine.encode(text, special=special, expert=expert)

    def decode(self, ids: Sequence[int], *, expert: RowExpert = None) -> str:
        """The engine's."""
        return self._engine.decode(ids, expert=expert)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        expert: RowExpert = None,
        go_on: bool = False,
        tools: Sequence[Message] = (),
    ) -> list[int]:
        """The engine's."""
        return self._engine.chat_prompt(messages, expert=expert, go_on=go_on, tools=tools)

    def chat_template_of(self, expert: RowExpert = None) -> str | None:
        """The engine's."""
        return self._engine.chat_template_of(expert)

    def embed(
        self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last"
    ) -> FloatArray:
        """The engine's."""
        return self._engine.embed(prompts, layers=layers, pooling=pooling)
