"""An opened expert whose neurons and heads are read in another order: another set of weights, the same function.

Knows axes and orders; how an order is found is `polymerge.method.align`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import SourceError
from ..method.align import groups_of, moved
from .axes import Axis
from .checkpoint import Checkpoint, OverBase

# The name of an axis -> the order of its units.
Orders = Mapping[str, Tensor]


@dataclass(frozen=True)
class Move:
    """One axis of one tensor in another order, as `polymerge.method.align.moved` takes it."""

    dim: int
    places: Tensor
    order: Tensor


Moves = Mapping[str, tuple[Move, ...]]


class AlignedCheckpoint(Checkpoint):
    """Another checkpoint, its tensors permuted when they are read: one whole tensor in memory at a time.

    Attributes:
        moves: its name of a tensor -> what happens to it; others are read as they are.
    """

    def __init__(self, checkpoint: Checkpoint, moves: Moves) -> None:
        self.label, self.folder, self.config = checkpoint.label, checkpoint.folder, checkpoint.config
        self.origin, self.tensors = checkpoint.origin, checkpoint.tensors
        self.unaligned, self.moves = checkpoint, moves

    def read(self, name: str) -> Tensor:
        tensor = self.unaligned.read(name)
        for move in self.moves.get(name, ()):
            tensor = moved(tensor, move.dim, move.places, move.order)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.moves:
            return self.read(name)[start:stop].clone()
        return self.unaligned.read_rows(name, start, stop)

    def over_base(self, name: str) -> OverBase | None:
        return None if name in self.moves else self.unaligned.over_base(name)

    def fingerprint(self) -> list[str]:
        return self.unaligned.fingerprint()


def moves_of(axes: Sequence[Axis], orders: Orders) -> dict[str, tuple[Move, ...]]:
    """What happens to every tensor when the axes are brought into these orders.

    Raises:
        SourceError: an order is missing, one too many, or none that leaves the function as it is.
    """
    names = {axis.name for axis in axes}
    unlike = next((name for name in sorted(names ^ set(orders))), None)
    if unlike:
        raise SourceError(
            f"align: {unlike!r} has an order but no such axis"
            if unlike in orders
            else f"align: the axis {unlike!r} has no order"
        )
    moves: dict[str, tuple[Move, ...]] = {}
    for axis in axes:
        heads = orders[axis.name].long()
        try:
            by_group = groups_of(heads, axis.groups or axis.units) if len(heads) == axis.units else None
        except ValueError as error:
            raise SourceError(f"align: the order of {axis.name!r} {error}") from None
        if by_group is None:
            raise SourceError(f"align: {axis.name!r} has {axis.units} units, its order {len(heads)}")
        for members, order in ((axis.members, heads), (axis.group_members, by_group)):
            for member in members:
                moves[member.tensor] = (*moves.get(member.tensor, ()), Move(member.dim, member.places, order))
    return moves
