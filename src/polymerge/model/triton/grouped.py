"""Residuals of a layer as they are stored, and the sum y = rho y + B (A x) over a batch that mixes experts.

Tokens of one expert are brought together in tiles (as in Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285), so
that a token meets its own expert's factors alone, whatever the others' ranks. `add_plain` is the sum in torch's own
operations: it takes mixtures of experts too, and the kernel of kernel.py is held against it.

Knows tensors and tokens; does not know modules, bundles or triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...method.code import Code
from ...method.quantised import decoded
from ..assignment import Assignment
from ..residual import Term, add_mixed, mixed_ratio
from ..shares import Member, on_device

# Tokens of a tile, by the bytes of an activation: tensor cores take 16 at least, and more would not fit the registers
# (read off the kernel compiled for an A100 and an H100).
TILE_SIZES = {2: (16, 32, 64), 4: (16,)}


class Rows(nn.Module):
    """One factor of all experts, one component a row: A [sum of r, in] or B^T [sum of r, out].

    Attributes:
        numbers: [R, width] as they are, or whole numbers packed into bytes, [R, ceil(width * bits / 8)] uint8.
        scales: of the whole numbers, [R, groups]; None for numbers as they are.
        width: in or out.
        bits: of a whole number; 0 for numbers as they are.
    """

    numbers: Tensor
    scales: Tensor | None

    def __init__(self, numbers: Tensor, scales: Tensor | None, width: int, bits: int) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.width, self.bits = width, bits

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first to last - 1, [last - first, width]."""
        numbers = self.numbers[first:last]
        if self.scales is None:
            return numbers.to(dtype)
        return decoded(numbers, self.scales[first:last], self.bits, self.width).to(dtype)


# decode(rows, first, last, dtype) -> [last - first, width]
Decode = Callable[[Rows, int, int, torch.dtype], Tensor]


class Residuals(nn.Module):
    """What all experts have beyond the base in one linear layer.

    Args:
        stored: every expert's tensors by the code's suffixes, which `code.check` accepts; None for rank 0.
        shape: (out, in) of the layer.
        ratios: rho of every expert.

    Attributes:
        a, b: the factors.
        ranks: of the N experts.
        starts: [N + 2] int32, where each expert's rows begin and the last one's end; the average, number N, has none.
        ratios: [N + 1] float32, rho; 1 for the average. table: the same on the CPU.
        scaled: whether any is not 1.
    """

    starts: Tensor
    ratios: Tensor

    def __init__(
        self, stored: Sequence[Mapping[str, Tensor] | None], code: Code, shape: tuple[int, int], ratios: Sequence[float]
    ) -> None:
        super().__init__()
        present = [tensors for tensors in stored if tensors]
        self.a, self.b = _stack("A", present, code, shape[1]), _stack("B", present, code, shape[0])
        # a row of A is a component, whatever the code
        self.ranks = tuple(len(tensors[code.suffixes[0]]) if tensors else 0 for tensors in stored)
        starts = torch.tensor([*_starts(self.ranks), sum(self.ranks)], dtype=torch.int32)
        self.register_buffer("starts", starts, persistent=False)
        self.table = torch.tensor([*ratios, 1.0])  # not a buffer, which would follow the model to its device
        self.register_buffer("ratios", self.table.clone(), persistent=False)
        self.scaled = any(ratio != 1.0 for ratio in ratios)


class Tiles(NamedTuple):
    """Tokens of a batch, those of one expert together. Tokens of the average are in no tile.

    Attributes:
        order: numbers of the tokens, [M] int32.
        table: for every tile its expert and the first and the last + 1 place in `order`, [tiles, 3] int32.
        size: at most so many tokens a tile.
        experts: that have a tile.
    """

    order: Tensor
    table: Tensor
    size: int
    experts: tuple[int, ...]

    @property
    def short(self) -> bool:
        """Whether no expert has more than one: with more of them its factors would be decoded again for each."""
        return len(self.table) == len(self.experts)


def tiles_of(state: Assignment, x: Tensor) -> Tiles | None:
    """The tiles of a layer's input x [B, ..., in]; None where a row of the batch is a mixture of experts.

    Made once for all layers of a batch.
    """
    if not all(1.0 in weights for weights, _ in state.groups):
        return None
    each = state.repeats(x.shape[0]) * x.shape[1:-1].numel()  # tokens of a row, which lie together
    sizes = TILE_SIZES[x.dtype.itemsize]
    return state.once(("tiles", each, x.dtype.itemsize), lambda: _make_tiles(state, each, sizes))


def _make_tiles(state: Assignment, each: int, sizes: Sequence[int]) -> Tiles:
    average = len(state.names)
    groups = [(weights.index(1.0), rows) for weights, rows in state.groups if weights.index(1.0) != average]
    largest = max((len(rows) for _, rows in groups), default=0) * each
    size = next((size for size in sizes if size >= largest), sizes[-1])
    table, begin = [], 0
    for expert, rows in groups:
        end = begin + len(rows) * each
        table += [(expert, place, min(place + size, end)) for place in range(begin, end, size)]
        begin = end
    within = torch.arange(each, device=state.device)
    order = [(rows[:, None] * each + within).flatten() for _, rows in groups]
    return Tiles(
        torch.cat(order).int() if order else within.new_empty(0).int(),
        torch.tensor(table, dtype=torch.int32, device=state.device).view(-1, 3),
        size,
        tuple(expert for expert, _ in groups),
    )


def add_plain(y: Tensor, x: Tensor, residuals: Residuals, state: Assignment, decode: Decode = Rows.decoded) -> None:
    """y := rho y + B (A x), in place, expert after expert, each decoded when its turn comes. Takes mixtures.

    Args:
        y: [M, out], the base's product.
        x: [M, in]; M is a multiple of the batch's rows.
        decode: as `Rows.decoded`.
    """

    def ratio() -> Tensor:
        rows = on_device(mixed_ratio(state.table, residuals.table), y.device)
        return rows.repeat_interleave(state.repeats(len(x)), dim=0)

    scaled = state.once((id(residuals), "ratio", len(x)), ratio) if residuals.scaled else None
    add_mixed(y, scaled, _terms(x, residuals, state, decode))


def _terms(x: Tensor, residuals: Residuals, state: Assignment, decode: Decode) -> Iterator[Term]:
    starts = _starts(residuals.ranks)
    for member in state.shares(None).members:
        first, last = starts[member.pair], starts[member.pair + 1]
        if first == last:
            continue
        rows, share = state.once(("rows", member.pair, len(x)), partial(_rows_of, member, state, len(x)))
        a, b = (decode(factor, first, last, x.dtype) for factor in (residuals.a, residuals.b))
        yield Term(x if rows is None else x[rows], a, b.T, share, rows)


def _rows_of(member: Member, state: Assignment, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Which of so many tokens have a part of a member's expert, None for all; and their shares, None for 1."""
    repeats = state.repeats(size)
    whole = all(part == 1.0 for part in member.parts)
    share = None if whole else torch.tensor(member.parts).repeat_interleave(repeats)[:, None]
    rows = None
    if len(member.rows) < state.rows:
        rows = (torch.tensor(member.rows)[:, None] * repeats + torch.arange(repeats)).flatten()
    return tuple(None if of is None else on_device(of, state.device) for of in (rows, share))  # type: ignore[return-value]


def _stack(factor: str, stored: Sequence[Mapping[str, Tensor]], code: Code, width: int) -> Rows:
    parts = [[expert[s] for expert in stored] for s in code.suffixes if s.startswith(f"lora_{factor}")]
    bits = code.kernel_bits or 0
    if not stored:
        return Rows(torch.empty(0, width), None, width, 0)
    if factor == "B" and not bits:  # published factors hold B as it is, [out, r]
        parts = [[b.T for b in parts[0]]]
    numbers, *scales = (torch.cat(tensors).contiguous() for tensors in parts)
    return Rows(numbers, scales[0] if scales else None, width, bits)


def _starts(ranks: Sequence[int]) -> list[int]:
    return [0, *accumulate(ranks)]
