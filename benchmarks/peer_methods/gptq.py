"""Inputs of an expert's layers, for peers that calibrate with GPTQ (Frantar et al. 2022, arXiv 2210.17323).

The rounding is `polymerge.method.gptq`, in the paper's settings. Second moments of inputs are collected in one pass of
the unquantised expert over training requests and answers, where the published code quantises layer by layer and feeds
the next one what the quantised ones give. The delta papers calibrate on general text (Delta-CoMe's repository on C4):
an expert's own requests are nearer to what it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from polymerge.method.gptq import Moments


@torch.no_grad()
def input_moments(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Moments]:
    """Name of a linear weight -> the moments of its inputs; layers that read one input share them.

    Args:
        batches: token ids and which of them count, [B, T], padded on the right.
    """
    sums: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    last: dict[str, Any] = {"input": None, "name": "", "mask": None}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is not last["input"]:
                last.update(input=inputs[0], name=name)
                x = inputs[0][last["mask"]]
                sums[name] = sums.get(name, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)
            owner[name] = last["name"]

        return hook

    linear = {f"{n}.weight": m for n, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linear.items()]
    tokens = 0
    for ids, mask in batches:
        ids, mask = ids.to(model.device), mask.to(model.device)
        last["mask"] = mask.bool()
        model.model(input_ids=ids, attention_mask=mask)  # without the head
        tokens += int(mask.sum())
    for hook in hooks:
        hook.remove()
    moments = {name: Moments((total / tokens).cpu()) for name, total in sums.items()}
    return {name: moments[which] for name, which in owner.items()}
