"""The base as a checkpoint: the average's weights in a bundle's folder, whatever bits they are stored in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..host import DTYPES
from ..sources.checkpoint import Checkpoint, open_folder
from ..sources.fused import SlicedCheckpoint
from ..sources.packed import PackedCheckpoint
from .layer import BundleLayer


def base_of(folder: Path, layers: Iterable[BundleLayer]) -> Checkpoint:
    """The average's weights in a bundle's folder, matrix by matrix as in the layers."""
    base, slices = open_folder(folder, label=str(folder)), {x.tensor: x.slice for x in layers if x.slice}
    if base.config.get("quantization_config"):
        base = PackedCheckpoint(base, DTYPES.get(str(base.config.get("dtype")), torch.float32))
    return SlicedCheckpoint(base, slices) if slices else base
