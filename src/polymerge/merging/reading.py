"""Reads the experts' tensors: a slab at a time, checked on the way, and hashed.

Knows checkpoints, and which numbers a merge refuses; does not know what is done with them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..bundle.files import raw_bytes
from ..errors import SourceError
from ..host import dtype_name
from ..sources.checkpoint import Checkpoint, OverBase

# read(expert, tensor name, start row, stop row) -> rows on the CPU in the stored dtype
Read = Callable[[str, str, int, int], Tensor]
# sums(expert, tensor name) -> the matrix as a sum over its base, or None
Sums = Callable[[str, str], OverBase | None]


def sums_of(checkpoints: Mapping[str, Checkpoint]) -> Sums:
    """Looks tensors of these experts up as sums over their bases."""
    return lambda expert, tensor: checkpoints[expert].over_base(tensor)


def reader_of(checkpoints: Mapping[str, Checkpoint]) -> Read:
    """Reads rows of the tensors of these experts."""

    def read(expert: str, tensor: str, start: int, stop: int) -> Tensor:
        checkpoint = checkpoints[expert]
        shape = checkpoint.tensors[tensor].shape
        whole = not shape or (start == 0 and stop >= shape[0])
        return checkpoint.read(tensor) if whole else checkpoint.read_rows(tensor, start, stop)

    return read


def checked_digest(tensor: Tensor, dtype: torch.dtype, expert: str, source: str) -> str:
    """SHA-256 of the tensor's bytes, once its values are checked."""
    digest = hashlib.sha256(raw_bytes(tensor)).hexdigest()
    check_values(tensor, dtype, expert, source)
    return digest


def check_values(values: Tensor, dtype: torch.dtype, expert: str, source: str) -> None:
    """Refuses values that are not finite, or too large for the arithmetic (float32) or the bundle (`dtype`).

    The extremes say both in one pass: a NaN anywhere is the minimum and the maximum.
    """
    if not values.is_floating_point() or not values.numel():
        return
    low, high = torch.aminmax(values)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(values)).sum())
        raise SourceError(
            f"expert {expert!r}: tensor {source!r} holds {bad} NaN or infinite values; the checkpoint is damaged"
        )
    if largest > min(torch.finfo(dtype).max, torch.finfo(torch.float32).max):
        raise SourceError(
            f"expert {expert!r}: tensor {source!r} holds {largest:.3g}, too large for {dtype_name(dtype)}; "
            "say a wider `dtype:` in the recipe"
        )


def check_stored(values: Tensor, tensor: str, what: str) -> None:
    """Refuses what was made of finite numbers and is too large for the bundle's dtype.

    Experts of very different norms have an average that is larger than each of them.
    """
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        raise SourceError(
            f"tensor {tensor!r}: {what} is too large for {dtype_name(values.dtype)}; say a wider `dtype:` in the recipe"
        )


def check_copy(tensor: Tensor, stored: Tensor, expert: str, source: str) -> None:
    """Refuses a tensor that the model does not know where it is another than the one that is stored for all."""
    if not same_numbers(tensor, stored):
        raise SourceError(
            f"expert {expert!r}: tensor {source!r} is unknown to its architecture and differs from the other experts'; "
            "a bundle holds one for all; take it out of the checkpoint if the model does not need it"
        )


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, up to the rounding of the coarser dtype of the two."""
    rounding = max((torch.finfo(t.dtype).eps for t in (one, other) if t.is_floating_point()), default=0.0)
    return torch.allclose(one.double(), other.double(), rtol=rounding, atol=0.0, equal_nan=True)
