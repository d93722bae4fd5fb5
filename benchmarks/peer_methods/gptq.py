"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, and those that are still to
come make good what the inputs notice of it.

From the paper, with its settings: columns by falling second moment (act-order), damping of 1%, blocks of 128 columns.
Second moments of inputs are collected in one pass of the unquantised expert over training requests and answers, where
the published code quantises layer by layer and feeds the next one what the quantised ones give. The delta papers
calibrate on general text (Delta-CoMe's repository on C4): an expert's own requests are nearer to what it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from peer_methods.grids import Grid

DAMPING, BLOCK = 0.01, 128


class Moments:
    """E[x x^T] of a layer's inputs, [in, in], and what GPTQ makes of it whatever it rounds."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @cached_property
    def order(self) -> Tensor:
        """Inputs by falling second moment."""
        return self.matrix.diagonal().argsort(descending=True)

    @cached_property
    def factor(self) -> Tensor:
        """The upper Cholesky factor of the inverse, damped and in order."""
        damped = self.matrix[self.order][:, self.order].double()
        damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp(min=1e-12))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper.float()


def gptq(weight: Tensor, moments: Moments, levels: Grid) -> Tensor:
    """weight [out, in] -> the rounded weight, every number on its grid."""
    factor, columns = moments.factor, levels.T  # rows lie together in memory, columns do not
    columns, work = columns[moments.order].contiguous(), weight.T[moments.order].contiguous()  # [in, out]
    rounded = torch.empty_like(work)
    for first in range(0, len(work), BLOCK):
        last = min(first + BLOCK, len(work))
        errors = torch.empty_like(work[first:last])
        for column in range(first, last):
            rounded[column] = columns[column].round(work[column])
            error = (work[column] - rounded[column]) / factor[column, column]
            work[column:last].addr_(factor[column, column:last], error, alpha=-1)
            errors[column - first] = error
        work[last:] -= factor[first:last, last:].T @ errors
    return rounded[moments.order.argsort()].T


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
