"""What a router answers: a Route. Knows no model and no classifier; the stages and the server need nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..data.shown import table

if TYPE_CHECKING:
    from ..model.assignment import RowExpert


@dataclass(frozen=True)
class Neighbour:
    """A training sample near a routed text: the reason of a route. `similarity` is the cosine, in [-1, 1]."""

    text: str
    field: str
    similarity: float


@dataclass(frozen=True)
class Route:
    """Where one text goes.

    Attributes:
        expert: what the engine is asked for: a name, a mixture, or None for the average.
        field: the likeliest knowledge area, also where the fallback answers.
        confidence: calibrated probability that the field is right, in [0, 1].
        scores: probability of every field.
        fallback: whether the confidence was under the threshold or the text out of domain.
        reason: one sentence for people.
        neighbours: the nearest training samples, the nearest first.
        truncated: tokens that were cut out of the text's middle before it was embedded.
    """

    expert: RowExpert
    field: str
    confidence: float
    scores: Mapping[str, float]
    fallback: bool = False
    reason: str = ""
    neighbours: tuple[Neighbour, ...] = ()
    truncated: int = 0

    def __repr__(self) -> str:
        why = " (fallback)" if self.fallback else ""
        return f"Route({self.expert or 'average'}{why}: {self.field} at {self.confidence:.1%})"

    def _repr_html_(self) -> str:
        near = {f"near, {n.similarity:.2f}": f"{n.field}: {n.text}" for n in self.neighbours}
        return table(repr(self), {"reason": self.reason} | near)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Routes(Protocol):
    """Anything that routes; `polymerge.router.Router` is one."""

    def route(self, texts: Sequence[str]) -> list[Route]:
        """One route a text, in their order."""
