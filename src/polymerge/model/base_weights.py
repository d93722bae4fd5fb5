"""The average's weights of a loaded bundle, for a second model with other experts of it: both have one copy in memory.

They are noted before any layer is put in its place, so that what an expert puts there for the time of a pass is never
taken for the average's. Knows modules and their parameters; does not know bundles or experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .linear import ExpertLinear
from .trial import Trial


class BaseWeights:
    """Of a transformers model that `load_model` has just loaded.

    Args:
        hashes: of the files that they were read from.
        trial: what was found by running it; a second model of these weights is not run again for that.
    """

    def __init__(self, hf: Any, hashes: Mapping[str, str], trial: Trial) -> None:
        self._kind, self._hf, self.hashes, self.trial = type(hf), hf, hashes, trial
        self._parameters: dict[str, nn.Parameter] = dict(hf.named_parameters(remove_duplicate=False))
        self._buffers: dict[str, Tensor] = {name: buffer.clone() for name, buffer in hf.named_buffers()}
        self._layers: dict[str, tuple[ExpertLinear, bool]] = {}

    @property
    def place(self) -> tuple[torch.dtype, torch.device]:
        """Of the weights as they are now."""
        return self._hf.dtype, self._hf.device

    def placed(self) -> None:
        """Once the experts' layers stand in their places: a matrix of theirs is followed to where it goes, since on a
        GPU it is laid elsewhere with the factors."""
        modules = dict(self._hf.named_modules(remove_duplicate=False))
        for name in list(self._parameters):
            path, _, leaf = name.rpartition(".")
            layer = modules.get(path)
            if leaf == "weight" and isinstance(layer, ExpertLinear) and layer.inner is None and layer.alone:
                # a view of it, which lies the other way where the layer stores [in, out]
                self._layers[name] = layer, layer.weight.stride() != self._parameters.pop(name).stride()

    def model(self) -> Any:
        """Another transformers model with these very weights; None where one cannot be made of them."""
        with torch.device("meta"):
            made = self._kind(copy.deepcopy(self._hf.config))
        lent: dict[int, nn.Parameter] = {}
        for name, parameter in list(made.named_parameters(remove_duplicate=False)):
            value = self._value(name)
            if value is None or value.shape != parameter.shape:
                return None
            owner = id(self._layers[name][0] if name in self._layers else value)  # one that is tied stays one
            _set(made, name, lent.setdefault(owner, nn.Parameter(value.detach(), requires_grad=False)))
        for name, _ in list(made.named_buffers()):
            if name not in self._buffers:
                return None
            _set(made, name, self._buffers[name].clone())
        if any(_is_missing(value) for module in made.modules() for value in vars(module).values()):
            return None
        made.generation_config = copy.deepcopy(self._hf.generation_config)
        return made.eval()

    def _value(self, name: str) -> Tensor | None:
        if name not in self._layers:
            return self._parameters.get(name)
        layer, transposed = self._layers[name]
        return layer.weight.data.T if transposed else layer.weight


def _is_missing(value: Any) -> bool:
    """A tensor that is neither a parameter nor a buffer, and has no values."""
    return isinstance(value, Tensor) and value.is_meta


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    (module._parameters if isinstance(value, nn.Parameter) else module._buffers)[leaf] = value  # type: ignore[assignment]
