"""Second moments of what linear layers are given, gathered while a model reads.

Knows modules and their inputs. Does not know what is read, nor what the moments are for (`polymerge.method.gptq`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..method.gptq import Moments


@torch.inference_mode()
def gathered(
    modules: Mapping[str, nn.Module],
    read: Callable[[], int],
    counted: Callable[[Tensor], Tensor],
    *,
    shared: bool = True,
) -> dict[str, Moments]:
    """Name -> E[x x^T] of a module's inputs over all tokens; on the CPU.

    Args:
        read: runs the model; how many tokens it read.
        counted: what a module is given, [..., in] -> the tokens of it that count, [n, in].
        shared: modules that read one input have one sum; where they do not always, all is read again without.
    """
    sums: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    last: dict[str, Any] = {"input": None, "name": ""}
    apart: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is not last["input"] or not shared:
                last.update(input=inputs[0], name=name)
                x = counted(inputs[0]).float()
                sums[name] = sums.get(name, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)
            if owner.setdefault(name, last["name"]) != last["name"]:
                apart.append(name)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        tokens = read()
    finally:
        for hook in hooks:
            hook.remove()
    if apart:
        return gathered(modules, read, counted, shared=False)
    moments = {name: Moments(sums.pop(name).div_(tokens).cpu()) for name in list(sums)}
    return {name: moments[which] for name, which in owner.items()}
