"""How the matrices of an average become whole numbers: to the nearest, or by GPTQ with what the layers are given.

GPTQ's second moments of inputs are of texts that every expert reads as itself, so what is rounded loses least where the
experts use it. They take a matrix [in, in] a layer, more than the layers themselves in large models; so they are
gathered for as many layers at a time as a budget holds, with one pass over the texts each. Knows loaded bundles and
matrices; does not know files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..bundle.layer import BundleLayer
from ..errors import ModelError
from ..host import dtype_name, free_memory
from ..method.gptq import Moments, gptq
from ..model.mixed import MixedModel
from ..sources.packed import Form, grid_of, scales_of
from .moments import gathered

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
    try:
        _read_all(model, texts)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def input_moments(model: MixedModel, texts: Texts, modules: Sequence[str]) -> dict[str, Moments]:
    """Module -> E[x x^T] of its inputs over all tokens, every expert's texts read by that expert; on the CPU."""
    named = {name: model.hf.get_submodule(name) for name in modules}
    return gathered(named, lambda: _read_all(model, texts), lambda given: given.flatten(0, -2))


def _read_all(model: MixedModel, texts: Texts) -> int:
    """How many tokens they have."""
    for expert, rows in texts.items():
        for ids in rows:
            model(torch.tensor([list(ids)], device=model.device), experts=expert, use_cache=False)
    return sum(len(ids) for rows in texts.values() for ids in rows)
