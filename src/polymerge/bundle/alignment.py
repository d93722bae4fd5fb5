"""`experts/<name>/alignment.safetensors`: the order in which a bundle has the neurons and heads of an expert's source.

One int32 tensor an axis, under the name of the module that has it: unit i in the bundle is unit order[i] of the source.
A query head takes its group along. `distance`, two numbers in float64, says how far the expert was from the first
before and after. Knows the file; not which axes there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import BundleError
from .files import FileEntry, entry_of, raw_bytes, write_safetensors
from .manifest import Manifest

ALIGNMENT_FILE = "alignment.safetensors"
DISTANCE = "distance"


@dataclass(frozen=True)
class Alignment:
    """How an expert was aligned.

    Attributes:
        orders: the name of an axis -> int64 [units].
        before, after: ||W - W_1|| / ||W_1|| over all tensors with an axis, W_1 being what it was aligned to.
    """

    orders: Mapping[str, Tensor]
    before: float
    after: float


def write_alignment(folder: Path, expert: str, alignment: Alignment) -> dict[str, FileEntry]:
    """Writes the file under `folder`. Returns its path relative to it."""
    tensors = {name: order.int() for name, order in alignment.orders.items()}
    distance = torch.tensor([alignment.before, alignment.after], dtype=torch.float64)
    tensors[DISTANCE] = distance
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    content = (bytes(raw_bytes(tensor)) for tensor in tensors.values())
    name = _name(expert)
    return {name: write_safetensors(folder / name, entries, content)}


def is_aligned(manifest: Manifest) -> bool:
    """Whether the bundle's experts were aligned, and one that is added shall be."""
    return any(_name(expert) in manifest.files for expert in manifest.experts)


def read_alignment(path: Path, manifest: Manifest, expert: str) -> Alignment | None:
    """How an expert was aligned; None for one that was not. Raises BundleError for a file that is no alignment."""
    if _name(expert) not in manifest.files:
        return None
    file = path / _name(expert)
    try:
        tensors = load_file(file)
        before, after = tensors.pop(DISTANCE).tolist()
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{file}: is no alignment ({error}); copy the bundle again") from None
    for name, order in tensors.items():
        if order.dtype != torch.int32 or not torch.equal(order.sort().values, torch.arange(len(order)).int()):
            raise BundleError(f"{file}: {name!r} is no order; copy the bundle again")
    return Alignment({name: order.long() for name, order in tensors.items()}, before, after)


def alignment_problems(path: Path, manifest: Manifest) -> Iterator[str]:
    """Files that are no alignments."""
    for expert in manifest.experts:
        try:
            read_alignment(path, manifest, expert)
        except BundleError as error:
            yield f"expert {expert!r}: {error}"


def _name(expert: str) -> str:
    return f"experts/{expert}/{ALIGNMENT_FILE}"
