"""How the matrices of an average become whole numbers: to the nearest, or by GPTQ with what the layers are given.

GPTQ's second moments of inputs are of texts that every expert reads as itself, so what is rounded loses least where the
experts use it. They take a matrix [in, in] a layer, more than the layers themselves in large models; so they are
gathered for as many layers at a time as a budget holds, with one pass over the texts each. Knows loaded bundles and
matrices; does not know files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..bundle.layer import BundleLayer
from ..errors import ModelError
from ..host import dtype_name, free_memory
from ..method.gptq import Moments, gptq
from ..model.mixed import MixedModel
from ..sources.packed import Form, grid_of, scales_of

# Of moments, in bytes; at most a quarter of what is free on a GPU.
BUDGET = 4 * 2**30

# expert -> token ids of its texts
Texts = Mapping[str, Sequence[Sequence[int]]]


class Rounder(Protocol):
    def __call__(self, layer: BundleLayer, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [out, in] -> whole numbers, int8 [out, in], and their scales."""


class Nearest:
    """Every number for itself."""

    def __init__(self, form: Form, dtype: torch.dtype) -> None:
        self._form, self._dtype = form, dtype

    def __call__(self, layer: BundleLayer, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = scales_of(weight, self._form, self._dtype)
        return grid_of(scale, self._form, weight.shape[1]).numbers(weight.float()).to(torch.int8), scale


class Calibrated:
    """By GPTQ.

    Args:
        layers: that a text comes to, in the order in which they will be rounded; all others are, to the nearest.
    """

    def __init__(
        self, form: Form, dtype: torch.dtype, model: MixedModel, texts: Texts, layers: Sequence[BundleLayer]
    ) -> None:
        self._form, self._dtype, self._model, self._texts = form, dtype, model, texts
        self._layers, self._moments = list(layers), dict[str, Moments]()
        self._nearest = Nearest(form, dtype)

    def __call__(self, layer: BundleLayer, weight: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            return self._nearest(layer, weight)
        if layer.module not in self._moments:
            self._moments.clear()  # before others take their place
            self._moments = input_moments(self._model, self._texts, self._next(layer))
        scale = scales_of(weight, self._form, self._dtype)
        grid = grid_of(scale, self._form, weight.shape[1])
        moments = self._moments[layer.module]
        if not bool(torch.isfinite(moments.matrix).all()):
            raise ModelError(f"{layer.module}: its inputs are not finite in {dtype_name(self._model.dtype)}")
        return grid.numbers(gptq(weight.float(), moments, grid)).to(torch.int8), scale

    def _next(self, layer: BundleLayer) -> list[str]:
        """The modules from this layer on whose moments the budget holds; at least this one."""
        free = free_memory(torch.device(self._model.device))
        left = BUDGET if free is None else min(BUDGET, free // 4)
        modules: list[str] = []
        for one in self._layers[self._layers.index(layer) :]:
            left -= 8 * one.shape[1] ** 2  # the moments, and their factor
            if left < 0 and modules:
                break
            modules.append(one.module)
        return modules


@torch.inference_mode()
def reached(model: MixedModel, texts: Texts, modules: Iterable[str]) -> set[str]:
    """Those of the modules that a text comes to. A tower of images has none."""
    seen: set[str] = set()
    hooks = [
        model.hf.get_submodule(name).register_forward_pre_hook(lambda module, inputs, name=name: seen.add(name))
        for name in modules
    ]
    _read_all(model, texts, hooks)
    return seen


@torch.inference_mode()
def input_moments(
    model: MixedModel, texts: Texts, modules: Sequence[str], *, shared: bool = True
) -> dict[str, Moments]:
    """Module -> E[x x^T] of its inputs over all tokens, every expert's texts read by that expert; on the CPU.

    Args:
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
                x = inputs[0].flatten(0, -2).float()
                sums[name] = sums.get(name, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)
            if owner.setdefault(name, last["name"]) != last["name"]:
                apart.append(name)

        return hook

    hooks = [model.hf.get_submodule(name).register_forward_pre_hook(watch(name)) for name in modules]
    tokens = _read_all(model, texts, hooks)
    if apart:
        return input_moments(model, texts, modules, shared=False)
    moments = {name: Moments(sums.pop(name).div_(tokens).cpu()) for name in list(sums)}
    return {name: moments[which] for name, which in owner.items()}


def _read_all(model: MixedModel, texts: Texts, hooks: Iterable[RemovableHandle]) -> int:
    """How many tokens they have. The hooks are taken off again."""
    try:
        for expert, rows in texts.items():
            for ids in rows:
                model(torch.tensor([list(ids)], device=model.device), experts=expert, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(len(ids) for rows in texts.values() for ids in rows)
