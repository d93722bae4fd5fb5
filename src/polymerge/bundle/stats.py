"""One line of merge_stats.jsonl: what the merge measured of one tensor of one expert.

Knows the line's fields; does not know how they are computed (`polymerge.merging.compress`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StatsLine:
    """Fields in the order of the file.

    Attributes:
        shape: (out, in) of the matrix.
        storage: "low_rank", "full", or "average" where the expert has nothing of its own.
        scale, mean_scale, scale_ratio: s_i, s̄ and rho_i.
        residual_norm: ||R|| / ||W||.
        energy_kept: 1 - ||R - BA||² / ||R||².
        relative_error: ||W - W'|| / ||W||.
        seconds: None where no time was taken.
    """

    tensor: str
    expert: str
    module: str
    shape: tuple[int, int]
    rank: int
    storage: str
    scale: float
    mean_scale: float
    scale_ratio: float
    residual_norm: float
    energy_kept: float
    relative_error: float
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
