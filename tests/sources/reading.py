"""The contract of every kind of checkpoint, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polymerge.sources.checkpoint import Checkpoint


def assert_reads_fresh(checkpoint: Checkpoint) -> None:
    """What was read may be overwritten: reading again gives the same bytes."""
    for name, info in checkpoint.tensors.items():
        reads: list[Callable[[], Tensor]] = [lambda name=name: checkpoint.read(name)]  # type: ignore[misc]
        if info.shape:
            rows = info.shape[0]
            reads += [
                lambda name=name, rows=rows: checkpoint.read_rows(name, 0, rows),  # type: ignore[misc]
                lambda name=name, rows=rows: checkpoint.read_rows(name, rows // 2, rows),  # type: ignore[misc]
            ]
        for read in reads:
            first = read()
            before = first.clone()
            first.fill_(7)
            assert torch.equal(read(), before), name
