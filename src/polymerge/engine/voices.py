"""With which tokenizer, template, end tokens, settings and context a request is answered: its expert's own.

Knows personas and what an engine makes of them; does not know models or batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from ..model.personas import speaker_of
from ..sources.persona import Group, Persona, load_tokenizer
from .base import Message
from .chat import chat_ids
from .defaults import GenerationDefaults, checkpoint_defaults
from .text import check_text

if TYPE_CHECKING:
    from ..model.assignment import RowExpert

# An expert's persona, and in which groups it is not the average's.
PersonaOf = Callable[[str], tuple[Persona, Sequence[Group]]]


@dataclass(frozen=True)
class Voice:
    """What one expert speaks with.

    Attributes:
        max_length: of its context, in tokens.
        lock: held while the tokenizer is used, where several threads share it: one changes its settings while it
            encodes.
    """

    tokenizer: Any
    defaults: GenerationDefaults
    max_length: int
    lock: AbstractContextManager[Any] = field(default_factory=nullcontext)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. Raises ModelError as `check_text` does."""
        check_text(text)
        with self.lock:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
            return ids

    def text(self, ids: Sequence[int], special: bool) -> str:
        """The text of token ids, with or without special tokens; that of one alone may be a part of a character."""
        with self.lock:
            text: str = self.tokenizer.decode(list(ids), skip_special_tokens=not special)
            return text

    def chat_prompt(
        self, messages: Sequence[Message], *, go_on: bool = False, tools: Sequence[Message] = ()
    ) -> list[int]:
        """Token ids of a conversation; without a chat template, its turns one below the other."""
        with self.lock:
            return chat_ids(self.tokenizer, messages, go_on=go_on, tools=tools)

    @property
    def chat_template(self) -> str | None:
        """That with tools, where there are several."""
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use", template.get("default"))
        return None if template is None else str(template)


class Voices:
    """Those of a bundle: the average's, and made when first asked for, those of experts that have their own.

    Args:
        average: the bundle's.
        persona_of: an expert's persona; None where all have the average's.
    """

    def __init__(self, average: Voice, persona_of: PersonaOf | None = None) -> None:
        self.average, self._persona_of = average, persona_of
        self._made: dict[str, Voice] = {}

    def of(self, expert: RowExpert) -> Voice:
        """A mixture has its heaviest member's.

        Raises:
            ModelError: its tokenizer cannot be used, or a setting means nothing.
        """
        name = speaker_of(expert)
        if name is None or self._persona_of is None:
            return self.average
        if name not in self._made:
            persona, groups = self._persona_of(name)
            if not groups:
                return self.average
            self._made[name] = _voice(self.average, name, persona, groups)
        return self._made[name]

    def apart(self) -> Self:
        """The same with tokenizers of its own, for another thread."""
        average = replace(self.average, tokenizer=copy.deepcopy(self.average.tokenizer))
        return type(self)(average, self._persona_of)


def _voice(average: Voice, name: str, persona: Persona, groups: Sequence[Group]) -> Voice:
    tokenizer, defaults, length = average.tokenizer, average.defaults, average.max_length
    if "tokenizer" in groups:
        tokenizer = load_tokenizer(persona)
    elif "template" in groups:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = persona.chat_template
    if "tokenizer" in groups or "generation" in groups:
        defaults = checkpoint_defaults(SimpleNamespace(**persona.generation), tokenizer, f"expert {name!r}")
    if "positions" in groups:
        length = persona.max_length or length
    return replace(average, tokenizer=tokenizer, defaults=defaults, max_length=length)


class Speaking:
    """What every engine that has voices says of an expert's tokens and templates."""

    if TYPE_CHECKING:  # an attribute of one engine, made when it is first asked for by the others

        @property
        def voices(self) -> Voices: ...

    def encode(self, text: str, *, special: bool = True, expert: RowExpert = None) -> list[int]:
        """Token ids of a text."""
        return self.voices.of(expert).encode(text, special=special)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        expert: RowExpert = None,
        go_on: bool = False,
        tools: Sequence[Message] = (),
    ) -> list[int]:
        """Token ids of a conversation; without a chat template, its turns one below the other."""
        return self.voices.of(expert).chat_prompt(messages, go_on=go_on, tools=tools)

    def chat_template_of(self, expert: RowExpert = None) -> str | None:
        """An expert's own."""
        return self.voices.of(expert).chat_template
