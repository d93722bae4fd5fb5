"""What a search is to reach: how it is written, and whether a measured bundle reaches it.

Users want every expert to be good, so the worst one decides. Does not know how anything is searched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import TargetError
from ..recipe.numbers import parse_size
from .agreement import Agreement
from .sweep import Point

# A size of more bytes is a slip of the pen.
LARGEST = 1e18


@dataclass(frozen=True)
class Target:
    """What is to be reached.

    Attributes:
        kind: `kl` (the worst expert's, in nats a token, at most), `accuracy` (the share of its original's that every
            expert keeps at least), `size` (the weights' bytes at most) or `times` (the same, in times one model).
        text: as it was written.
    """

    kind: Literal["kl", "accuracy", "size", "times"]
    value: float
    text: str

    def is_reached(self, point: Point) -> bool:
        """Of kl and accuracy."""
        if self.kind == "kl":
            return all(agreement.kl <= self.value for agreement in point.experts.values())
        # shares of few examples are quotients that may miss a round figure by the last bit
        return all((agreement.kept or 0.0) >= self.value - 1e-9 for agreement in point.experts.values())

    def limit(self, one_model: int) -> int:
        """Bytes that a bundle's weights may take. Of size and times."""
        return math.floor(self.value * one_model if self.kind == "times" else self.value)

    def words(self, point: Point) -> str:
        """The worst expert's figure."""

        def badness(name: str) -> float:
            agreement = point.experts[name]
            return agreement.kl if self.kind == "kl" else -(agreement.kept or 0.0)

        name = max(point.experts, key=badness)
        worst: Agreement = point.experts[name]
        return (
            f"worst KL {worst.kl:.2g} ({name})" if self.kind == "kl" else f"least kept {worst.kept or 0:.1%} ({name})"
        )


def read_target(text: str) -> Target:
    """`kl=0.001`, `accuracy=99%` (or 0.99), `size=600MB` or `size=1.2x` (times one model).

    Raises:
        TargetError: one line that says what is wrong with it.
    """
    kind, _, written = (part.strip() for part in str(text).partition("="))
    if kind == "size":
        return _read_size(text, written)
    if kind not in ("kl", "accuracy"):
        raise TargetError(f"target {text!r}: write kl=0.001, accuracy=99%, size=600MB or size=1.2x (times one model)")
    try:
        value = float(written.removesuffix("%")) / (100 if written.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if kind == "kl":
        if value == 0:
            raise TargetError(f"target {text!r}: only compress_rate 0 has a KL of 0, as it keeps every expert whole")
        if not 0 < value < math.inf or "%" in written:
            raise TargetError(f"target {text!r}: a KL is a number over 0, in nats a token, such as kl=0.001")
        return Target("kl", value, text)
    if not 0 < value <= 1:
        raise TargetError(f"target {text!r}: a share of the original's accuracy is over 0% and at most 100%")
    return Target("accuracy", value, text)


def _read_size(text: str, written: str) -> Target:
    try:
        if written.endswith("x"):
            value = float(written.removesuffix("x"))
            kind: Literal["size", "times"] = "times"
        else:
            value, kind = float(parse_size(written)), "size"
    except (ValueError, OverflowError):
        value, kind = math.nan, "size"
    if not 0 < value < LARGEST:
        raise TargetError(f"target {text!r}: a size is written as size=600MB, size=1.5 GB or size=1.2x (one model's)")
    return Target(kind, value, text)
