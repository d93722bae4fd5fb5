"""Which experts, and which thinker, to put together: the best mean of each field's best accuracy within a memory limit.

Knows accuracies and bytes; does not know models. A thinker counts as one more model that may be a field's best: an
estimate, since how much of its answer the formatter keeps is not measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import comb
from typing import Any

from .sizes import Family, working_bytes

# Up to so many sets every one is tried; beyond that the best set grows by the expert that adds most.
EXHAUSTIVE_SETS = 50_000
# field -> accuracy of one model; a field that is not there counts as 0
Accuracies = Mapping[str, float]


@dataclass(frozen=True)
class Proposal:
    """One set.

    Attributes:
        accuracy: mean over fields of the best accuracy of any of its models.
        best: field -> the model that is best there.
        bundle_bytes, thinker_bytes: of the weights.
        working_bytes: beside the weights, the largest that any of its models was measured to need on a GPU.
    """

    experts: tuple[str, ...]
    thinker: str | None
    accuracy: float
    best: Mapping[str, str]
    bundle_bytes: int
    thinker_bytes: int
    working_bytes: int

    @property
    def bytes(self) -> int:
        """All that it needs in memory."""
        return self.bundle_bytes + self.thinker_bytes + self.working_bytes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes, "label": self.label}

    @property
    def label(self) -> str:
        """In words: "bash + math, with phi thinking first"."""
        return " + ".join(self.experts) + (f", with {self.thinker} thinking first" if self.thinker else "")


@dataclass(frozen=True)
class Proposals:
    """What is proposed and what else there was.

    Attributes:
        chosen: None where nothing fits.
        runner_up: the next best set that is not the chosen one with idle models added.
        unlimited: the best set without the limit, where that is another one.
        why: one sentence for people.
        sets: how many were compared; `exhaustive` says whether these were all.
        notes: which candidates cannot be merged with each other.
    """

    chosen: Proposal | None
    runner_up: Proposal | None
    unlimited: Proposal | None
    why: str
    sets: int
    exhaustive: bool
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        sets = {"chosen": self.chosen, "runner_up": self.runner_up, "unlimited": self.unlimited}
        return {
            **{name: proposal.to_json() if proposal else None for name, proposal in sets.items()},
            "why": self.why,
            "sets": self.sets,
            "exhaustive": self.exhaustive,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Choices:
    """All that a proposal is made of.

    Attributes:
        accuracy: of every candidate and thinker, by name.
        thinkers: name -> bytes of its weights.
        working: name -> bytes beside the weights.
        limit: bytes, or None.
        most: the largest number of experts.
    """

    fields: Sequence[str]
    accuracy: Mapping[str, Accuracies]
    families: Sequence[Family]
    thinkers: Mapping[str, int]
    working: Mapping[str, int]
    limit: float | None = None
    most: int | None = None


def propose(choices: Choices, *, exhaustive_sets: int = EXHAUSTIVE_SETS, notes: Sequence[str] = ()) -> Proposals:
    """The best set, the runner-up, and the best without the limit. Of equals the smaller one is better."""
    everything = sum(comb(len(f.members), n) for f in choices.families for n in range(1, _most(choices, f) + 1)) * (
        1 + len(choices.thinkers)
    )
    exhaustive = everything <= exhaustive_sets
    proposals = [
        _proposal(choices, family, experts, thinker)
        for family in choices.families
        for thinker in (None, *choices.thinkers)
        for experts in (_all_sets(choices, family) if exhaustive else _greedy_sets(choices, family, thinker))
    ]
    proposals.sort(key=lambda proposal: (-proposal.accuracy, proposal.bytes))
    fitting = [p for p in proposals if choices.limit is None or p.bytes <= choices.limit]
    chosen = fitting[0] if fitting else None
    runner_up = next((p for p in fitting[1:] if chosen and not _only_adds_idle(chosen, p)), None)
    unlimited = proposals[0] if proposals and (chosen is None or proposals[0].accuracy > chosen.accuracy) else None
    why = _why(choices, chosen, runner_up, unlimited)
    return Proposals(chosen, runner_up, unlimited, why, len(proposals), exhaustive, tuple(notes))


def _most(choices: Choices, family: Family) -> int:
    return min(len(family.members), choices.most or len(family.members))


def _all_sets(choices: Choices, family: Family) -> Iterator[tuple[str, ...]]:
    for count in range(1, _most(choices, family) + 1):
        yield from combinations(family.members, count)


def _greedy_sets(choices: Choices, family: Family, thinker: str | None) -> Iterator[tuple[str, ...]]:
    """From every first expert, the set grows by the one that adds most, as long as any adds something."""
    for first in family.members:
        experts: tuple[str, ...] = (first,)
        yield experts
        while len(experts) < _most(choices, family):
            left = [name for name in family.members if name not in experts]
            grown = [_proposal(choices, family, (*experts, name), thinker) for name in left]
            best = max(grown, key=lambda proposal: proposal.accuracy)
            if best.accuracy <= _proposal(choices, family, experts, thinker).accuracy:
                break
            experts = best.experts
            yield experts


def _proposal(choices: Choices, family: Family, experts: tuple[str, ...], thinker: str | None) -> Proposal:
    models = (*experts, thinker) if thinker else experts
    best = {
        name: max(models, key=lambda model: choices.accuracy.get(model, {}).get(name, 0.0)) for name in choices.fields
    }
    reached = [choices.accuracy.get(model, {}).get(name, 0.0) for name, model in best.items()]
    return Proposal(
        experts=experts,
        thinker=thinker,
        accuracy=sum(reached) / len(reached) if reached else 0.0,
        best=best,
        bundle_bytes=family.bundle_bytes(len(experts)),
        thinker_bytes=choices.thinkers[thinker] if thinker else 0,
        working_bytes=working_bytes(choices.working, models),
    )


def _only_adds_idle(chosen: Proposal, other: Proposal) -> bool:
    """The chosen set with models added that are no field's best."""
    same_thinker = chosen.thinker in (None, other.thinker)
    return same_thinker and set(chosen.experts) <= set(other.experts) and other.accuracy <= chosen.accuracy


def _why(choices: Choices, chosen: Proposal | None, runner_up: Proposal | None, unlimited: Proposal | None) -> str:
    limit = f"{(choices.limit or 0) / 1e9:.4g} GB"
    if chosen is None:
        if unlimited is None:
            return "no candidate could be measured"
        return f"nothing fits {limit}; the best set needs {unlimited.bytes / 1e9:.4g} GB"
    parts = [f"{chosen.label} reaches {chosen.accuracy:.1%} in {chosen.bytes / 1e9:.4g} GB"]
    if runner_up is not None:
        parts.append(f"next is {runner_up.label}, {_behind(choices, chosen, runner_up)}")
    if unlimited is not None:
        parts.append(
            f"without the limit of {limit} it would be {unlimited.label}, {unlimited.accuracy:.1%} in "
            f"{unlimited.bytes / 1e9:.4g} GB"
        )
    return "; ".join(parts)


def _behind(choices: Choices, chosen: Proposal, other: Proposal) -> str:
    if other.accuracy >= chosen.accuracy:
        return f"as accurate, but {(other.bytes - chosen.bytes) / 1e6:.4g} MB larger"

    def reached(proposal: Proposal, name: str) -> float:
        return choices.accuracy.get(proposal.best[name], {}).get(name, 0.0)

    worst = max(choices.fields, key=lambda name: reached(chosen, name) - reached(other, name))
    return (
        f"{chosen.accuracy - other.accuracy:.1%} behind, most in {worst} "
        f"({reached(other, worst):.1%} against {reached(chosen, worst):.1%})"
    )
