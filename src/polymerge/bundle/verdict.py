"""What a merge left of an expert, in words: whether it answers as before, what is short, and what would do.

A prediction from how much of its residual's energy is kept, which the merge has measured; how well that tells what
an expert answers was measured too (docs/codes.md, `benchmarks/verdict.py`). Only held-out requests tell for sure:
`polymerge merge --prompts`. Knows lines of merge_stats.jsonl.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..method.code import Code
from ..method.codes import NEAREST
from ..recipe.rates import AnyRates
from .stats import module_kind

Answer = Literal["as before", "nearly as before", "perhaps otherwise"]
SAID: Mapping[Answer, str] = {
    "as before": "answers as before",
    "nearly as before": "answers nearly as before",
    "perhaps otherwise": "may not answer as before",
}
# Shares of energy kept from which on an expert is said to answer as its original, and nearly so: on the safe side of
# what was measured, where 64% left some experts at 99% of the same likeliest tokens and 84% one at 94%.
AS_BEFORE, NEARLY = 0.9, 0.75
# A kind of layer is short where it has lost at least so much of all that is lost.
SHARE_OF_LOSS = 0.2
# So many times the rank of published factors int4 has in their bytes.
INT4_RANKS = 3.8


@dataclass(frozen=True)
class Verdict:
    """Of one expert.

    Attributes:
        answers: predicted.
        energy_kept: share of its residuals' energy, in [0, 1]; averaged embeddings and heads are counted as lost.
        short: kinds of layers that lost most of what is lost, such as `k_proj`; empty where nothing is to be done.
        averaged: tables of which the bundle has the average alone, where these are short.
        cure: what in the recipe would do, such as `code: int4`; empty where nothing is to be done.
    """

    answers: Answer
    energy_kept: float
    short: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    cure: str = ""

    @property
    def words(self) -> str:
        """One line, without the expert's name."""
        reasons = [f"{_joined(self.averaged)} averaged"] * bool(self.averaged)
        reasons += [f"rank is short in {_joined(self.short)}"] * bool(self.short)
        why = f": {'; '.join(reasons)}" if reasons else ""
        cure = f"; {self.cure} would do" if self.cure else ""
        return f"{SAID[self.answers]} ({self.energy_kept:.0%} of its residual kept){why}{cure}"


def verdict_of(lines: Sequence[Mapping[str, Any]], tables: Container[str], *, code: Code, rate: AnyRates) -> Verdict:
    """From an expert's lines of merge_stats.jsonl.

    Args:
        tables: tensors that are embeddings or heads.
        code, rate: the bundle's.
    """
    kept = _kept(lines)
    if kept >= AS_BEFORE:
        return Verdict("as before", kept)
    averaged = [line for line in lines if line["tensor"] in tables and line["storage"] == "average"]
    rest = [line for line in lines if line not in averaged]
    tables_short, short = _short(averaged, lines), _short(rest, lines)
    cures = ["`embeddings: compress`"] * bool(tables_short)
    cures += [cure for cure in [_more_rank(_kept(rest), code, rate)] if short and cure]
    answers: Answer = "nearly as before" if kept >= NEARLY else "perhaps otherwise"
    return Verdict(answers, kept, short, tables_short, " and ".join(cures))


def _joined(kinds: Sequence[str]) -> str:
    return " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)


def _kept(lines: Sequence[Mapping[str, Any]]) -> float:
    energy: float = sum(_energy(line) for line in lines)
    return 1.0 - _lost(lines) / energy if energy else 1.0


def _energy(line: Mapping[str, Any]) -> float:
    norm: float = line["residual_norm"] * line["scale"]
    return norm * norm


def _lost(lines: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(_energy(line) * (1.0 - line["energy_kept"]) for line in lines))


def _short(lines: Sequence[Mapping[str, Any]], among: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Kinds of layers that have a good part of all that is lost, the worst first; the worst where they have one
    together."""
    whole = _lost(among)
    by_kind: dict[str, float] = defaultdict(float)
    for line in lines:
        by_kind[module_kind(line["module"])] += _lost([line])
    if sum(by_kind.values()) < SHARE_OF_LOSS * whole:
        return ()
    worst = sorted(by_kind, key=lambda kind: -by_kind[kind])
    return tuple(kind for kind in worst if by_kind[kind] >= SHARE_OF_LOSS * whole) or tuple(worst[:1])


def _more_rank(kept: float, code: Code, rate: AnyRates) -> str:
    """What gives the rank at which enough of the energy would be kept; empty where that cannot be told.

    The lost share of a fine-tune's energy falls about as exp(-c sqrt(rank)): a rank four times as large squares it
    (docs/codes.md).
    """
    if not isinstance(rate, float) or not 0.0 < kept < 1.0 or rate == 1.0:
        return ""
    times = (math.log(1.0 - AS_BEFORE) / math.log(1.0 - kept)) ** 2
    if code.peft_readable:
        if times <= INT4_RANKS:
            return f"`code: {NEAREST}`"
        return f"`code: {NEAREST}` with `compress_rate: {_rate(rate, times / INT4_RANKS)}`"
    return f"`compress_rate: {_rate(rate, times)}`"


def _rate(rate: float, times: float) -> str:
    """A rate with so many times the rank, two figures, rounded down."""
    return f"{max(0.0, math.floor((1.0 - (1.0 - rate) * times) * 100) / 100):g}"
