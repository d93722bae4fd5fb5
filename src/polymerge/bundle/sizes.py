"""What a bundle takes on disk, beside what its experts would take apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Bytes of a bundle's weights.

    Attributes:
        base: the average.
        experts: expert -> its adapter and scales.
        one_model: one dense model in the bundle's dtype; the base, where that is not stored in fewer bits.
    """

    base: int
    experts: dict[str, int]
    one_model: int

    @property
    def total(self) -> int:
        return self.base + sum(self.experts.values())

    @property
    def separate_models(self) -> int:
        return self.one_model * len(self.experts)

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "experts": self.experts,
            "total": self.total,
            "separate_models": self.separate_models,
            "share_of_one_model": self.total / self.one_model,
        }
