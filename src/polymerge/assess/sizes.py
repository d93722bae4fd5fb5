"""What sets of candidates would weigh as bundles, from configurations and headers alone.

Knows plans of merges; reads no weight. Candidates that cannot be merged with each other fall into families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import PolymergeError
from ..host import DTYPES
from ..merging.plan import plan_merge
from ..recipe.merge import Recipe
from ..recipe.source import Source
from ..sources.opening import open_checkpoint

# A merge's recipe for some of the candidates, by name.
MakeRecipe = Callable[[list[str]], Recipe]


@dataclass(frozen=True)
class Family:
    """Candidates that fit each other.

    Attributes:
        base_bytes: of the average, or of one member alone.
        expert_bytes: what one more expert adds, at most (tensors that experts share count for each).
    """

    members: tuple[str, ...]
    base_bytes: int
    expert_bytes: int

    def bundle_bytes(self, count: int) -> int:
        """Of a set of `count` members. One alone is a plain model and needs no residual."""
        return self.base_bytes + (count * self.expert_bytes if count > 1 else 0)


def families(
    sources: Mapping[str, Source], recipe: MakeRecipe, dtype: str | None = None
) -> tuple[list[Family], list[str]]:
    """The families of candidates, and why there are several. A candidate joins the first family with all of whose
    members it can be merged.

    Args:
        dtype: of the merge; by default as stored.

    Raises:
        SourceError: a candidate cannot be opened.
    """
    groups: list[list[str]] = []
    notes = []
    for name in sources:
        refused = []
        for group in groups:
            reason = _refusal([*group, name], recipe)
            if not reason:
                group.append(name)
                break
            refused.append(reason)
        else:
            groups.append([name])
            notes += refused[:1]
    return [_family(group, sources, recipe, dtype) for group in groups], notes


def dense_bytes(source: Source, dtype: str | None = None) -> int:
    """Bytes of a plain model's weights, as stored or in another dtype. Raises SourceError."""
    size = DTYPES[dtype].itemsize if dtype else None
    infos = open_checkpoint(source).tensors.values()
    return sum(info.numel * (size or (info.dtype.itemsize if info.dtype else 1)) for info in infos)


def working_bytes(peaks: Mapping[str, int], names: Sequence[str]) -> int:
    """The largest working memory of any of these."""
    return max((peaks.get(name, 0) for name in names), default=0)


def _refusal(names: list[str], recipe: MakeRecipe) -> str:
    """Why candidates cannot be merged; empty where they can."""
    try:
        plan_merge(recipe(names))
    except PolymergeError as error:
        *others, last = names
        return f"{', '.join(others)} and {last} cannot be merged: {error}"
    return ""


def _family(group: list[str], sources: Mapping[str, Source], recipe: MakeRecipe, dtype: str | None) -> Family:
    if len(group) == 1:
        return Family(tuple(group), dense_bytes(sources[group[0]], dtype), 0)
    plan = plan_merge(recipe(group))
    return Family(tuple(group), plan.base_bytes, plan.residual_bytes + plan.own_bytes)
