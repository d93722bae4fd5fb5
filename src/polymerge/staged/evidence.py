"""Where thinking helps, and how to ask: what validation data said about every field, for what is `auto`.

Knows rows of scores and the test that they must pass. Does not know how the scores came about. Kept in the bundle's
folder as `staged.json`; bound to the bundle, the thinker and the prompts that were measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import BundleError, first_problem
from .asking import AskedField, AskingEvidence

FILE = "staged.json"
Way = Literal["direct", "v1", "v2"]
# A stage is used where so large a gain over direct answers would be rarer than this by chance (one-sided sign test).
SIGNIFICANCE = 0.05
Field = TypeVar("Field", bound=AskedField)


class FieldEvidence(AskedField):
    """The same of the ways to answer."""

    best: Way


class FormScore(BaseModel):
    """One way of giving answers a form: the share of `rows` that have it, and the share that is right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    valid: float
    right: float


class Evidence(BaseModel):
    """What was measured, with which bundle, thinker and prompts.

    Attributes:
        thinker, prompts: empty where no thinking was measured.
        forms: field -> way (free, constrained, think 1 ...) -> its figures, where they were asked for.
        asking: the ways of asking for a direct answer, where they were asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str
    thinker: str
    prompts: str
    fields: dict[str, FieldEvidence]
    forms: dict[str, dict[str, FormScore]] = {}
    asking: AskingEvidence | None = None

    @classmethod
    def load(cls, bundle: str | Path) -> Evidence | None:
        """The evidence in a bundle's folder; None where there is none.

        Raises:
            BundleError: the file is damaged.
        """
        file = Path(bundle) / FILE
        if not file.exists():
            return None
        try:
            return cls.model_validate_json(file.read_bytes())
        except (ValidationError, OSError) as error:
            reason = first_problem(error) if isinstance(error, ValidationError) else error.strerror
            raise BundleError(f"{file}: cannot be used ({reason}); run `polymerge stages` again") from None

    def to_bytes(self) -> bytes:
        """The file's content."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


def weigh(scores: Mapping[str, Sequence[float]]) -> FieldEvidence:
    """Which way of answering a field deserves: direct answers, which cost less, are the ones to beat.

    Args:
        scores: way -> one score in [0, 1] for every row, the same rows for all; "direct" is the first.
    """
    return _weighed(FieldEvidence, scores, SIGNIFICANCE)


def weigh_asking(scores: Mapping[str, Sequence[float]]) -> AskedField:
    """Which way of asking a field deserves; the first is the one to beat.

    There are up to seven others, so each must be rarer by chance than its share of `SIGNIFICANCE` (Bonferroni).
    """
    return _weighed(AskedField, scores, SIGNIFICANCE / max(1, len(scores) - 1))


def _weighed(field: type[Field], scores: Mapping[str, Sequence[float]], chance: float) -> Field:
    """The best mean wins if its gain over the first way would be rarer by chance; otherwise the first does."""
    best, *others = scores
    first = scores[best]
    means = {way: sum(rows) / max(1, len(rows)) for way, rows in scores.items()}
    for way in others:
        if means[way] > means[best] and _chance(first, scores[way]) < chance:
            best = way
    return field(rows=len(first), scores=means, best=best)


def _chance(before: Sequence[float], after: Sequence[float]) -> float:
    """One-sided sign test: how often a fair coin would give at least as many better rows among those that differ."""
    better = sum(b > a for a, b in zip(before, after, strict=True))
    worse = sum(b < a for a, b in zip(before, after, strict=True))
    both = better + worse
    return float(sum(math.comb(both, k) for k in range(better, both + 1)) / 2**both)
