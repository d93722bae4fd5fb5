"""Whose tokenizer and whose positions speak for a row: an expert's own, or for a mixture those that its members share.

Knows a bundle's personas; does not know layers or requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..sources.persona import Group, Persona, load_tokenizer, same_words
from .assignment import RowExpert

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

AVERAGE = "average"


class Personas:
    """The personas of a loaded bundle. A tokenizer is loaded when it is first asked for, and once for all that have it.

    Args:
        trust_remote_code: let a tokenizer's own code run.
    """

    def __init__(self, bundle: Bundle, *, trust_remote_code: bool = False) -> None:
        self._bundle, self._trust = bundle, trust_remote_code
        self._tokenizers: dict[tuple[Any, ...], Any] = {}
        self._mixtures: set[frozenset[str]] = set()

    def of(self, expert: RowExpert) -> Persona:
        """A mixture has its heaviest member's; the first of several."""
        return self._bundle.persona(speaker_of(expert))

    def with_groups(self, expert: str) -> tuple[Persona, tuple[Group, ...]]:
        """An expert's, and in which groups it is not the bundle's. Raises BundleError for an unknown name."""
        persona = self._bundle.persona(expert)
        return persona, self._bundle.manifest.experts[expert].persona

    def tokenizer(self, expert: RowExpert) -> Any:
        """Raises ModelError where there is none that can be used."""
        persona = self.of(expert)
        key = (persona.folder, *sorted(persona.templates.items()))
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(persona, trust_remote_code=self._trust)
        return self._tokenizers[key]

    def check_mixture(self, members: Mapping[str, float]) -> None:
        """Raises ModelError where members have other positions or tokens; names two of them."""
        names = frozenset(members)
        if names in self._mixtures or len(names) < 2:
            return
        first, *others = members
        for other in others:
            self._check_pair(first, other)
        self._mixtures.add(names)

    def _check_pair(self, one: str, other: str) -> None:
        first, second = self.of(one), self.of(other)
        label = f"a mixture of {one!r} and {other!r}"
        if first.positions != second.positions:
            raise ModelError(f"{label}: their positions differ; ask one of them, or route")
        if first.folder != second.folder and not same_words(self.tokenizer(one), self.tokenizer(other)):
            raise ModelError(f"{label}: their tokenizers differ; ask one of them, or route")


def speaker_of(expert: RowExpert) -> str | None:
    """The name whose persona counts; None for the average's, which is the bundle's."""
    if isinstance(expert, Mapping):
        name = max(expert, key=expert.__getitem__)
        return None if name == AVERAGE else name
    return None if expert is None or expert == AVERAGE else expert
