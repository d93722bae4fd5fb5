"""Inputs of an expert's layers, for peers that calibrate with GPTQ (Frantar et al. 2022, arXiv 2210.17323).

The rounding is `polymerge.method.gptq`, in the paper's settings. Second moments of inputs are collected in one pass of
the unquantised expert over training requests and answers, where the published code quantises layer by layer and feeds
the next one what the quantised ones give. The delta papers calibrate on general text (Delta-CoMe's repository on C4):
an expert's own requests are nearer to what it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from polymerge.export.moments import gathered
from polymerge.method.gptq import Moments


def input_moments(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Moments]:
    """Name of a linear weight -> the moments of its inputs; layers that read one input share them.

    Args:
        batches: token ids and which of them count, [B, T], padded on the right.
    """
    on_device = [(ids.to(model.device), mask.to(model.device)) for ids, mask in batches]
    counting: list[Tensor] = []

    def read() -> int:
        for ids, mask in on_device:
            counting[:] = [mask.bool()]
            model.model(input_ids=ids, attention_mask=mask)  # without the head
        return sum(int(mask.sum()) for _, mask in on_device)

    linear = {f"{n}.weight": m for n, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    return gathered(linear, read, lambda given: given[counting[0]])
