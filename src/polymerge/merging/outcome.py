"""What became of one tensor: hashes, ratios, statistics, and whose share is another's too.

Knows names and numbers; no tensors, and nothing of how they were stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..bundle.stats import StatsLine


@dataclass
class TensorReport:
    """What became of one tensor.

    Attributes:
        digests: expert -> SHA-256 of the source tensor's bytes.
        scales: expert -> rho_i (float32), for tensors that are stored against the base.
        stats: one line of merge_stats.jsonl an expert, for what is compressed, and for tables of which the average
            alone is stored.
        borrowed: expert -> the one whose share is its own too, and what its factors count for it.
    """

    digests: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    stats: list[StatsLine] = field(default_factory=list)
    borrowed: dict[str, tuple[str, float]] = field(default_factory=dict)

    def repeat(self, twin: str, expert: str) -> None:
        """Notes an expert whose tensor is another one's, to the bit: whatever the other has stored is its own too."""
        if twin in self.scales:
            self.scales[expert] = self.scales[twin]
        line = next((line for line in self.stats if line.expert == twin), None)
        if line:
            self.stats.append(replace(line, expert=expert, seconds=0.0))
        if line is None or line.rank or line.storage == "full":
            self.borrowed[expert] = twin, 1.0


def twin_of(expert: str, digests: Mapping[str, str]) -> str | None:
    """The first expert with the same tensor as this one, if that comes before it."""
    first = next(name for name, digest in digests.items() if digest == digests[expert])
    return first if first != expert else None
