"""What is kept of an original's accuracy, request by request, and how sure that is.

The interval is the paired bootstrap's (Efron and Tibshirani 1993, chapter 13): requests are drawn again with what both
models made of them. Knows examples; does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polymerge.search.agreement import ExampleAgreement

DRAWS, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Kept:
    """A share of the original's accuracy, and the interval that holds it at `LEVEL`."""

    share: float
    low: float
    high: float


def kept(experts: Mapping[str, Sequence[ExampleAgreement]], seed: int = 0) -> tuple[dict[str, Kept], Kept | None]:
    """Every expert's, without those whose original answers nothing rightly, and the mean of these."""
    random = np.random.default_rng(seed)
    shares, draws = {}, {}
    for name, examples in experts.items():
        right = np.array([[e.right, e.original_right] for e in examples if e.right is not None], dtype=float)
        if len(right) and right[:, 1].any():
            shares[name] = float(right[:, 0].sum() / right[:, 1].sum())
            sums = right[random.integers(len(right), size=(DRAWS, len(right)))].sum(axis=1)
            draws[name] = sums[:, 0] / np.maximum(sums[:, 1], 1.0)
    by_expert = {name: _kept(share, draws[name]) for name, share in shares.items()}
    if not shares:
        return by_expert, None
    mean = sum(shares.values()) / len(shares)
    return by_expert, _kept(mean, np.mean(list(draws.values()), axis=0))


def _kept(share: float, draws: np.ndarray[Any, np.dtype[np.float64]]) -> Kept:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Kept(share, float(low), float(high))
