"""Products of many small matrices, each with its own rows: one kernel, or one batch of them, however many there are.

Knows tensors and entries; does not know layers or experts. Nothing here makes the host wait for a device.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .shares import Entries

# GPUs whose kernel for rows of unequal numbers reads them where they are; elsewhere torch reads them back to the host.
GROUPING = (9, 10)  # Hopper and Blackwell
ALIGNED = 16  # bytes, of every row of a matrix


def together(x: Tensor, entries: Entries) -> Tensor:
    """Entries' rows [M, ..., k] as `product` takes them: one matrix a place, or all below each other."""
    if not entries.size:
        return x.reshape(-1, x.shape[-1])
    return x.reshape(-1, entries.size * x.shape[1:-1].numel(), x.shape[-1])


def product(x: Tensor, matrices: Tensor, entries: Entries) -> Tensor:
    """Every entry's rows times the matrix of its place.

    Args:
        x: [used, rows, k], or [rows, k] where places have different numbers of entries.
        matrices: [places, k, n].

    Returns:
        As x, with n for k.
    """
    if entries.size:
        used = entries.used
        return torch.bmm(x, matrices[used] if isinstance(used, slice) else matrices.index_select(0, used))
    if len(x) == 1:  # any stride is true of one row, and an aligned one is wanted
        x = x.as_strided(x.shape, (-(-x.shape[1] // ALIGNED) * ALIGNED, 1))
    each = len(x) // len(entries.rows)
    return torch._grouped_mm(x, matrices, offs=entries.ends if each == 1 else entries.ends * each)


def groups(x: Tensor, *widths: int) -> bool:
    """Whether `product` takes places with different numbers of entries without reading those numbers back.

    Args:
        widths: k and n of the matrices in the dimension that is contiguous.
    """
    aligned = all(width * x.itemsize % ALIGNED == 0 for width in widths)
    return aligned and x.dtype is torch.bfloat16 and x.device.type == "cuda" and _has_kernel(x.device)


@functools.lru_cache
def _has_kernel(device: torch.device) -> bool:
    if (
        not hasattr(torch, "_grouped_mm")
        or torch.version.hip
        or torch.cuda.get_device_capability(device)[0] not in GROUPING
    ):
        return False
    x = torch.zeros(4, 16, dtype=torch.bfloat16, device=device)
    ends = torch.tensor([1, 4], dtype=torch.int32, device=device)
    try:
        z = torch._grouped_mm(x, x.new_zeros(2, 7, 16).transpose(1, 2), offs=ends)
        torch._grouped_mm(z, x.new_zeros(2, 7, 16), offs=ends)
    except RuntimeError:
        return False
    return True
