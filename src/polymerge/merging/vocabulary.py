"""Which rows of a bundle's tables stand for which expert's tokens.

A bundle's table has as many rows as the largest expert's, and a row there stands for the token of the first expert that
has one at its place. Rows at which an expert has another token, or none where others have one, are its own. Two
tokenizers may give a row other tokens where it was added to one of them at least; two that differ in their own words
are of two vocabularies, whose rows mean nothing to each other. Knows tokens and numbers of rows; no weights, no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bundle.bundle import Bundle
from ..errors import SourceError
from ..sources.persona import Group, Persona
from ..sources.vocabulary import Vocabulary, vocabulary_of
from .personas import Personas

AVERAGE = "average"  # no expert's name

# [start, stop) one after the other
Ranges = tuple[tuple[int, int], ...]
_NONE: Ranges = ()


@dataclass(frozen=True)
class Tables:
    """The rows of experts' tables in a bundle's.

    Attributes:
        size: rows of the bundle's.
        sizes: expert -> rows of its own, the first so many of the bundle's.
        ranges: expert -> rows that do not stand for the bundle's token.
    """

    size: int
    sizes: Mapping[str, int]
    ranges: Mapping[str, Ranges] = field(default_factory=dict)

    def narrow(self, expert: str) -> int | None:
        """Rows of an expert's tables where the bundle's have more."""
        rows = self.sizes[expert]
        return rows if rows < self.size else None

    def own_rows(self, expert: str) -> Tensor:
        """Numbers of the rows that are an expert's own. int64 [n]"""
        return torch.tensor(numbers_of(self.ranges.get(expert, ())), dtype=torch.int64)

    def holds(self, role: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of the bundle has a row a token."""
        return role in ("embedding", "lm_head", "bias") and shape[:1] == (self.size,)

    @property
    def most_own(self) -> int:
        """Rows of the expert that has most of its own."""
        return max((sum(stop - start for start, stop in part) for part in self.ranges.values()), default=0)


def merged_tables(
    personas: Personas, sizes: Mapping[str, int], *, averaged: bool, trust_remote_code: bool = False
) -> tuple[Tables | None, str]:
    """Those of a merge, None where all experts have the same rows and tokens; and what could not be compared, if
    anything.

    Args:
        sizes: rows of every expert's tables.
        averaged: a table is stored once for all experts.

    Raises:
        SourceError: two vocabularies contradict each other; names the first token. Or tokens that this machine cannot
            read would be averaged.
    """
    size, one_size = max(sizes.values()), len(set(sizes.values())) == 1
    ranges, note = dict[str, Ranges](), ""
    if any("tokenizer" in groups for groups in personas.groups.values()):
        voices = {name: persona if persona.files else personas.bundle for name, persona in personas.experts.items()}
        # Those that have words of their own first: a contradiction is theirs, not of one that borrows them.
        order = sorted(voices, key=lambda name: not personas.experts[name].files)
        vocabularies = _vocabularies({name: voices[name] for name in order}, sizes, trust_remote_code)
        ranges, note = _ranges(vocabularies), _unread(vocabularies, averaged)
    return (None if one_size and not ranges else Tables(size, sizes, ranges)), note


def tables_of_bundle(bundle: Bundle) -> Tables | None:
    """Those of a bundle that holds just the experts that it was merged of; None as for `merged_tables`."""
    records, size = bundle.manifest.experts, bundle.table_rows
    if size is None or not any("tokenizer" in e.persona or e.vocabulary for e in records.values()):
        return None
    sizes = {name: bundle.vocabulary(name) or size for name in records}
    vocabularies = _vocabularies({name: bundle.persona(name) for name in records}, sizes, False)
    return Tables(size, sizes, _ranges(vocabularies))


def added_tables(
    bundle: Bundle,
    name: str,
    persona: Persona,
    groups: Sequence[Group],
    rows: tuple[int, int],
    *,
    trust_remote_code: bool = False,
) -> tuple[Tables | None, str]:
    """Those of an expert that is added, None where it has the rows and tokens of the bundle's table; and what could not
    be compared, or nothing.

    Args:
        groups: in which its persona is not the bundle's.
        rows: of its tables, and of the bundle's, which are no fewer.

    Raises:
        SourceError: its vocabulary contradicts one that is there, or its tokens cannot be read here and the bundle has
            the average's alone.
    """
    (count, size), ranges, note = rows, _NONE, ""
    if any("tokenizer" in unlike for unlike in (groups, *(e.persona for e in bundle.manifest.experts.values()))):
        there = {expert or AVERAGE: bundle.persona(expert) for expert in (None, *bundle.experts)}
        sizes = {expert or AVERAGE: bundle.vocabulary(expert) or size for expert in (None, *bundle.experts)}
        voices = {**there, name: persona if persona.files else bundle.persona()}
        vocabularies = _vocabularies(voices, {**sizes, name: count}, trust_remote_code)
        _shared(vocabularies)
        method = bundle.manifest.method
        note = _unread(vocabularies, {method.embeddings, method.lm_head} != {"keep"})
        ranges = _own(vocabularies.pop(name), _shared(vocabularies))
    own = {name: ranges} if ranges else {}
    return (None if count == size and not ranges else Tables(size, {name: count}, own)), note


def numbers_of(ranges: Ranges) -> list[int]:
    """All rows of ranges, in order."""
    return [row for start, stop in ranges for row in range(start, stop)]


def ranges_of(rows: Sequence[int]) -> Ranges:
    """Numbers in order as ranges."""
    starts = [row for place, row in enumerate(rows) if not place or rows[place - 1] != row - 1]
    stops = [row + 1 for place, row in enumerate(rows) if place + 1 == len(rows) or rows[place + 1] != row + 1]
    return tuple(zip(starts, stops, strict=True))


def _vocabularies(voices: Mapping[str, Persona], sizes: Mapping[str, int], trust: bool) -> dict[str, Vocabulary]:
    """Every expert's; a tokenizer that several have is read once for each size."""
    read: dict[tuple[object, int], Vocabulary] = {}
    for name, persona in voices.items():
        key = persona.folder, sizes[name]
        if key not in read:
            read[key] = vocabulary_of(persona, sizes[name], trust_remote_code=trust)
    return {name: read[persona.folder, sizes[name]] for name, persona in voices.items()}


def _unread(vocabularies: Mapping[str, Vocabulary], averaged: bool) -> str:
    """What a user should hear of tokenizers that this machine cannot open. Raises SourceError where rows of tokens that
    nobody compared would be averaged."""
    unread = [name for name, vocabulary in vocabularies.items() if vocabulary.tokens is None]
    if not unread:
        return ""
    names = ", ".join(map(_label, unread))
    said = f"the tokenizer of {names} cannot be opened here, so that its tokens are not compared with the others'"
    if averaged:
        raise SourceError(
            f"{said}, and rows would be averaged; install what it needs, trust its code, or keep embeddings and head"
        )
    return f"{said}; every expert keeps its own"


def _ranges(vocabularies: Mapping[str, Vocabulary]) -> dict[str, Ranges]:
    """Expert -> its rows that do not stand for the bundle's token, if any. Raises SourceError as `_shared`."""
    shared = _shared(vocabularies)
    return {name: rows for name, vocabulary in vocabularies.items() if (rows := _own(vocabulary, shared))}


def _shared(vocabularies: Mapping[str, Vocabulary]) -> dict[int, str]:
    """Row -> the token that it stands for in a bundle. Raises SourceError for two that contradict each other."""
    shared: dict[int, str] = {}
    words: dict[int, tuple[str, str]] = {}
    for name, vocabulary in vocabularies.items():
        for row, token in sorted((vocabulary.tokens or {}).items()):
            shared.setdefault(row, token)
            if vocabulary.word(row) is None:
                continue
            whose, word = words.setdefault(row, (name, token))
            if word != token:
                raise SourceError(
                    f"{_label(whose)} and {_label(name)} have other vocabularies: token {row} is {word!r} in one and "
                    f"{token!r} in the other; only tokens that were added may differ"
                )
    return shared


def _label(name: str) -> str:
    return "the average" if name == AVERAGE else f"expert {name!r}"


def _own(vocabulary: Vocabulary, shared: Mapping[int, str]) -> Ranges:
    """Rows whose token is not the bundle's, or that stand for one in one of the two alone."""
    tokens = vocabulary.tokens
    if tokens is None:
        return ()
    rows = sorted(row for row in {*shared, *tokens} if row < vocabulary.size)
    return ranges_of([row for row in rows if tokens.get(row) != shared.get(row)])
