"""One line of merge_stats.jsonl, what the merge measured of one tensor of one expert, and sums over lines.

Knows the line's fields; does not know how they are computed (`polymerge.merging.compress`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def energy_kept(stats: Iterable[Mapping[str, Any]]) -> float:
    """1 - sum ||R - BA||² / sum ||R||² over the lines: large residuals count for more than small ones."""
    lost = total = 0.0
    for line in stats:
        energy = (line["residual_norm"] * line["scale"]) ** 2
        total += energy
        lost += energy * (1.0 - line["energy_kept"])
    return 1.0 - lost / total if total else 1.0


def relative_error(stats: Iterable[Mapping[str, Any]], key: str = "relative_error") -> float:
    """sqrt(sum ||W - W'||² / sum ||W||²) over the lines; with `residual_norm`, of keeping the average alone."""
    lost = total = 0.0
    for line in stats:
        total += line["scale"] ** 2
        lost += (line[key] * line["scale"]) ** 2
    return float((lost / total) ** 0.5) if total else 0.0


def module_kind(module: str) -> str:
    """`q_proj` of `model.layers.3.self_attn.q_proj`; block experts are one kind (`experts.w1`)."""
    parts = [part for part in module.split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if len(parts) > 1 and parts[-2] == "experts" else parts[-1]
