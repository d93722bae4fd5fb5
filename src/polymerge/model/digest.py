"""What went into a module and came out, in a few numbers a row: whether two batches differ in their first row there.

Knows tensors. Does not know modules, nor what is made of the comparison (`polymerge.model.trial`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROWS = 3  # of the trial's batches
# A tensor is reduced to this many random sums for every row.
SUMS = 16


@dataclass
class Call:
    """Digests of what went into a module and came out ("->")."""

    arguments: int
    values: dict[str, Tensor] = field(default_factory=dict)
    clear: bool = True

    def see(self, key: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.values[key] = _digest(value)
        elif isinstance(value, Mapping):
            for name, part in value.items():
                self.see(f"{key}.{name}", part)
        elif isinstance(value, list | tuple):
            for number, part in enumerate(value):
                self.see(f"{key}.{number}" if key != "->" else key if len(value) == 1 else f"->.{number}", part)
        elif not isinstance(value, ATOMS) and not callable(value):
            self.clear = False

    def compared(self, other: Call, change: float) -> dict[str, str]:
        """For every tensor: it follows the "rows"; it is the same in all batches and has as many parts as there are
        rows ("alike"), or one ("one"), or any number ("whole"); or something "other"."""
        keys = self.values.keys() | other.values.keys()
        return {key: _compared(self.values.get(key), other.values.get(key), change) for key in sorted(keys)}


ATOMS = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size, slice)


def _digest(value: Tensor) -> Tensor:
    """[parts, SUMS + 1]: for every row random sums of its numbers, squashed, and their size; the shape comes first.

    One part where the first dimension is not a multiple of the rows. A complex number (turned positions) is two.
    """
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    parts = ROWS if value.dim() and value.shape[0] and not value.shape[0] % ROWS else 1
    flat = value.detach().reshape(parts, -1).float().nan_to_num()
    flat = flat / (1 + flat.abs())
    sums = flat @ _signs(flat.shape[1], flat.device) / max(1, flat.shape[1]) ** 0.5
    size = flat.norm(dim=1, keepdim=True) / max(1, flat.shape[1]) ** 0.5
    first = value.shape[0] if value.dim() else 0
    return torch.cat([sums, size, torch.full_like(size, float(first))], dim=1).cpu()


@functools.lru_cache(maxsize=16)
def _signs(length: int, device: torch.device) -> Tensor:
    """[length, SUMS] of 1 and -1, the same for every tensor of a length."""
    generator = torch.Generator().manual_seed(length)
    signs = torch.randint(0, 2, (length, SUMS), generator=generator)
    return signs.to(device, torch.float32) * 2 - 1


def _compared(one: Any, two: Any, change: float) -> str:
    if one is None or two is None or one.shape != two.shape or not torch.equal(one[:, -1], two[:, -1]):
        return "other"
    far = (one[:, :-2] - two[:, :-2]).abs().amax(dim=1) > change * (one[:, -2] + two[:, -2]).clamp(min=1e-6)
    if not far.any():
        return "alike" if len(one) == ROWS else "one" if one[0, -1] == 1 else "whole"
    return "rows" if len(one) == ROWS and far.tolist() == [True, *[False] * (ROWS - 1)] else "other"
