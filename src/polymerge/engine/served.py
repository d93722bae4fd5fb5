"""What engines have in common whose model another server runs: they read and write text by an exported folder's voices.

Knows a folder and its voices; how a runtime is asked is its own engine's.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..sources.checkpoint import read_json
from ..sources.persona import Group, Persona, load_tokenizer, read_persona
from .base import Prompt, ScoreRequest
from .defaults import GenerationDefaults, folder_defaults
from .scoring import scored_pair
from .text import in_vocabulary
from .voices import Speaking, Voice, Voices

if TYPE_CHECKING:
    from ..model.assignment import RowExpert


class ServedEngine(Speaking, ABC):
    """The words' side of `polymerge.engine.Engine`.

    Attributes:
        folder: of the export.
    """

    folder: Path

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The served context, in tokens."""

    @cached_property
    def depth(self) -> int:
        """The average's layers, as the export's config.json says."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        return int(config.get_text_config().num_hidden_layers)

    @abstractmethod
    def _persona(self, expert: str, average: Persona) -> tuple[Persona, tuple[Group, ...]]:
        """An expert's, as the export's note says, and in which groups it is not the average's."""

    def _average_persona(self) -> Persona:
        return read_persona(self.folder, read_json(self.folder / "config.json"))

    @cached_property
    def voices(self) -> Voices:
        """The bundle's tokenizer, and each expert's template and settings."""
        base = self._average_persona()
        tokenizer = load_tokenizer(base)
        lock = threading.RLock()  # whoever reads an answer decodes it
        average = Voice(tokenizer, folder_defaults(self.folder, tokenizer), self.max_length, lock)
        return Voices(average, lambda expert: self._persona(expert, base))

    def max_length_of(self, expert: RowExpert = None) -> int:
        """The served context is the same for all."""
        return self.max_length

    def defaults_of(self, expert: RowExpert = None) -> GenerationDefaults:
        """What the exported generation_config.json says, or the expert's own."""
        return self.voices.of(expert).defaults

    def decode(self, ids: Sequence[int], *, expert: RowExpert = None) -> str:
        """The text of token ids, without special tokens. Raises ModelError for ids outside the vocabulary."""
        return self.voices.of(expert).text(self.checked(ids), False)

    def ids(self, prompt: Prompt, expert: RowExpert = None, *, special: bool = True) -> list[int]:
        """Token ids of a prompt. Raises ModelError as `checked` does."""
        if isinstance(prompt, str):
            return self.encode(prompt, special=special, expert=expert)
        return self.checked(prompt)

    def checked(self, ids: Sequence[int]) -> list[int]:
        """Token ids as they are. Raises ModelError for one outside the served vocabulary."""
        return in_vocabulary(ids, self._tokens)

    def _pair(self, request: ScoreRequest) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what is scored after it. Such a server has to write a token after these."""
        context = self.ids(request.context, request.expert)
        ids = self.ids(request.continuation, request.expert, special=False)
        return scored_pair(context, ids, self.voices.of(request.expert).tokenizer, self.max_length - 1)

    @cached_property
    def _tokens(self) -> int:
        config = read_json(self.folder / "config.json")
        return int((config.get("text_config") or config).get("vocab_size") or len(self.voices.average.tokenizer))
