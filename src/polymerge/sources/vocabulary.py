"""An expert's vocabulary: how many rows its tables have, and which token each row stands for.

Tables are the tensors with one row a token: the input embedding, the output head and its bias. A row behind the tokens
is padding. Knows tokenizers and configurations; does not know how several vocabularies become one
(`polymerge.merging.vocabulary`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from .persona import Persona, load_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Rows and tokens.

    Attributes:
        size: rows of the tables.
        tokens: row -> its token. None: not known on this machine.
        added: rows whose token was added to the tokenizer's own words, special tokens among them.
    """

    size: int
    tokens: Mapping[int, str] | None
    added: frozenset[int] = frozenset()

    def word(self, row: int) -> str | None:
        """The token of a row that is one of the tokenizer's own words."""
        return None if self.tokens is None or row in self.added else self.tokens.get(row)


def vocabulary_of(persona: Persona, size: int, *, trust_remote_code: bool = False) -> Vocabulary:
    """That of a persona whose tables have so many rows."""
    try:
        tokenizer = load_tokenizer(persona, trust_remote_code=trust_remote_code)
    except ModelError:  # as for `same_tokenizer`: only the files of such a one are known
        return Vocabulary(size, None)
    added = {int(row): str(token) for row, token in tokenizer.added_tokens_decoder.items()}
    tokens = {int(row): str(token) for token, row in sorted(tokenizer.get_vocab().items())} | added
    return Vocabulary(size, {row: token for row, token in tokens.items() if row < size}, frozenset(added))


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A config.json with so many rows, of the text model where it has one."""
    changed, text = dict(config), config.get("text_config")
    if isinstance(text, Mapping):
        changed["text_config"] = {**text, "vocab_size": size}
    if not isinstance(text, Mapping) or "vocab_size" in config:
        changed["vocab_size"] = size
    return changed
