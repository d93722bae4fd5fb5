"""What counts of every expert's residuals, matrix by matrix: files of what its layers were given and how its answers
heeded what they gave.

Who fills them is `polymerge.search.calibrate`; what rows do to factors is `polymerge.method.weights`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..method.weights import Side, Weights
from .treatment import TensorTask

# What counts are directions: eight bits of a number are enough.
STORED = torch.bfloat16
# Sides of matrices that are kept at hand: layers that read one input come one after the other.
AT_HAND = 16


@dataclass(frozen=True)
class Calibrated:
    """Of one expert: the file of what counts, a digest of its texts' tokens, and what the bundle says for it."""

    expert: str
    file: Path
    digest: str
    note: str


class Calibration:
    """Of the experts that have texts.

    Attributes:
        digests: expert -> digest of its texts' tokens.
        notes: what the bundle says of itself for it.
    """

    def __init__(self, experts: Sequence[Calibrated]) -> None:
        self._files = {one.expert: one.file for one in experts}
        self.digests = {one.expert: one.digest for one in experts}
        self.notes = tuple(one.note for one in experts)
        self._places = {expert: _places(file) for expert, file in self._files.items()}
        self._side = lru_cache(maxsize=AT_HAND)(self._read)

    def of(self, task: TensorTask) -> dict[str, Weights]:
        """Expert -> what counts of its residual of one tensor; experts of whom nothing is known are left out."""
        return {
            expert: Weights(*(self._side(expert, key) if key else None for key in places[task.record.module]))
            for expert, places in self._places.items()
            if task.record.module in places and expert in task.sources
        }

    def _read(self, expert: str, key: str) -> Side:
        with safe_open(self._files[expert], framework="pt") as file:
            return Side(file.get_tensor(key))


def write_seen(file: Path, seen: Mapping[str, Weights]) -> None:
    """Module -> what counts there, to a file; what several modules share is written once."""
    tensors: dict[str, Tensor] = {}
    keys: dict[int, str] = {}
    places = {module: [_key(side, tensors, keys) for side in (w.inputs, w.outputs)] for module, w in seen.items()}
    save_file(tensors, file, {"places": json.dumps(places)})


def _key(side: Side | None, tensors: dict[str, Tensor], keys: dict[int, str]) -> str | None:
    if side is None:
        return None
    key = keys.setdefault(id(side.rows), str(len(keys)))
    tensors[key] = side.rows.to(STORED)
    return key


def _places(file: Path) -> dict[str, list[str | None]]:
    """Module -> the keys of its two sides."""
    with safe_open(file, framework="pt") as opened:
        places: dict[str, list[str | None]] = json.loads(opened.metadata()["places"])
    return places
