"""y = rho (W̄ x) + B (A x) where a tensor on the device says which expert a row has, and the host knows nothing of it.

So a layer starts the same kernels whoever the rows' experts are, and what was captured for one batch is right for the
next. For one token a row, as a decoding step has. Knows tensors; does not know batches or modules.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a batch that the kernels take: all are in one tile.
MOST_ROWS = 64
# All experts' A are multiplied with the base where they have at most this share of its rows, whoever is asked for.
MOST_JOINED = 0.25
# Rows of what is multiplied together are filled up to a multiple of so many.
ROUND = 128


class Numbered:
    """The factors of one layer.

    Args:
        a: [sum of r, in]. b: [sum of r, out], transposed. offsets: where each expert's components begin, and the last
            one's end.
        ratios: rho of every expert, and the average's.
        base: [out, in] where the matrix may be laid elsewhere; None where it is another's too, or no matrix.

    Attributes:
        joined: on a GPU, the base with A below it, [out + sum of r and more, in], which one product reads; a view of
            each takes their place.
    """

    def __init__(
        self, a: Tensor, b: Tensor, offsets: Sequence[int], ratios: Sequence[float], base: Tensor | None = None
    ) -> None:
        ranks = [end - begin for begin, end in itertools.pairwise(offsets)]
        self.joined = _joined(base, a) if base is not None and has_kernels(a.device) else None
        self.a, self.b = a if self.joined is None else self.joined[b.shape[1] :][: len(a)], b
        self.highest = max(ranks, default=0)
        self.starts = torch.tensor([*offsets, offsets[-1]], dtype=torch.int32).to(a.device)
        self.ratios = torch.tensor(ratios).to(a.device)
        self.owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(a.device)

    def joins(self, rows: int) -> bool:
        """Whether `product` is the way for so many rows."""
        outputs = self.b.shape[1]
        worth = rows >= len(self.ratios) - 1 or len(self.a) <= MOST_JOINED * outputs
        return self.joined is not None and rows <= MOST_ROWS and worth

    def product(self, x: Tensor, numbers: Tensor) -> Tensor:
        """rho (W̄ x) + B (A x), [B, ..., out]; arguments as `add`'s."""
        from .triton.decoding import expand

        assert self.joined is not None
        yz = F.linear(x.reshape(-1, x.shape[-1]), self.joined)
        outputs = self.b.shape[1]
        y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
        z = yz[None, :, outputs:]
        expand(yz[:, :outputs], y.view(-1, outputs), z, self.b, self.starts, self.ratios, numbers)
        return y

    def add(self, y: Tensor, x: Tensor, numbers: Tensor) -> None:
        """y := rho y + B (A x), in place.

        Args:
            y: [B, ..., out], the base's product; x: [B, ..., in]; one token a row.
            numbers: [B] int64, every row's expert; the one after the last is the average.
        """
        flat_x, flat_y = x.reshape(-1, x.shape[-1]).contiguous(), y.view(-1, y.shape[-1])
        if len(numbers) <= MOST_ROWS and has_kernels(x.device):
            from .triton.decoding import expand, shrink

            z = shrink(flat_x, self.a, self.starts, numbers, self.highest)
            expand(flat_y, flat_y, z, self.b, self.starts, self.ratios, numbers)
        else:
            self._combine(flat_y, F.linear(flat_x, self.a), self.b, numbers)

    def look_up(self, y: Tensor, ids: Tensor, numbers: Tensor) -> None:
        """y := rho y + B[ids] A, in place, for a table of tokens. y: [B, 1, H]; ids: [B, 1]."""
        self._combine(y.view(-1, y.shape[-1]), self.b.index_select(1, ids.flatten()).T, self.a, numbers)

    def _combine(self, y: Tensor, z: Tensor, factor: Tensor, numbers: Tensor) -> None:
        """y := rho y + z's own components times a factor. y: [B, n]; z: [B, sum of r]; factor: [sum of r, n]."""
        update = (z * (self.owner == numbers[:, None])) @ factor
        torch.addcmul(update, y, self.ratios.index_select(0, numbers)[:, None], out=y)  # in float32, and rounded once


def _joined(base: Tensor, a: Tensor) -> Tensor:
    """Kernels for products are fast where their sizes are round: measured on an H200, twice to five times."""
    return torch.cat([base, a, a.new_zeros(-(len(base) + len(a)) % ROUND, a.shape[1])])


@functools.lru_cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels can be started on tensors of this device."""
    return device.type == "cuda" and not torch.version.hip and find_spec("triton") is not None
