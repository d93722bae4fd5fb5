"""Who runs a module apart for some of the rows, where parameters of it are an expert's own.

Where a layer does not see rows as they are, the innermost module around it that can be run for a part of them is run
once for every expert; where there is none, the whole model is. Knows modules and trials; does not know bundles.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..errors import ModelError
from .assignment import Assignment
from .groups import WholeModel
from .lookup import MixedEmbedding
from .multiplies import multiplies
from .own import OwnModule, OwnNorm, OwnTensor
from .quantised import is_quantised
from .tree import Tree
from .trial import Trial

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placed:
    """What stands in the place of modules' forwards, and how a mixed batch is run."""

    modules: Sequence[nn.Module]
    strategy: Literal["layers", "groups"]


class Holders:
    """Of one model's modules.

    Args:
        label: of the bundle, for errors.

    Attributes:
        parts: what stands for a module, by its identity.
    """

    def __init__(self, hf: Any, state: Assignment, trial: Trial, tree: Tree, label: str) -> None:
        self._hf, self._state, self._trial, self._tree, self._label = hf, state, trial, tree, label
        self.parts: dict[int, OwnModule | OwnNorm | MixedEmbedding] = {}
        self._whole: list[OwnTensor] = []  # that only the whole model can hold
        self._idle: list[OwnTensor] = []  # that a batch of tokens does not use
        self._apart = False

    def placed(self) -> Placed:
        """All of them, when everything has its place."""
        for part in self.parts.values():
            if isinstance(part, OwnModule):
                part.blends = _is_sum_of_weights(part)
        groups = self._apart or bool(self._whole)
        whole = [self._whole_model(self._hf, groups)]
        if isinstance(self._hf.base_model, nn.Module) and self._hf.base_model is not self._hf:
            whole.append(self._whole_model(self._hf.base_model, groups))
        if groups:
            logger.info("%s: a mixed batch runs once for every expert", type(self._hf).__name__)
        return Placed([*self.parts.values(), *whole], "groups" if groups else "layers")

    def _whole_model(self, module: nn.Module, groups: bool) -> WholeModel:
        states = [(self._tree.modules[name], attribute) for name, attribute in self._trial.states]
        whole = WholeModel(self._state, module, split=groups, tried=self._trial.inputs, states=states)
        whole.tensors = [*self._whole, *self._idle]
        return whole

    def hold(self, module: str, tensors: Sequence[OwnTensor]) -> None:
        """Gives parameters of a module to the innermost one around them that can be run apart for some rows."""
        names = [tensor.name for tensor in tensors]
        for tensor in tensors:
            self.refuse_quantised(tensor.module, tensor.name, "is an expert's own")
        if self._trial.is_idle(module, names):
            self._idle += tensors
            return
        holder = self._holder(module, names)
        if holder is None:
            self._whole += tensors
        else:
            holder.tensors += tensors

    def split_above(self, module: str, names: Sequence[str]) -> None:
        """Rows are told apart further up than in a layer that does not see them as they are."""
        self._apart |= self._holder(module, names) is None

    def refuse_quantised(self, inner: nn.Module, name: str, why: str) -> None:
        """Raises ModelError for a parameter that a library holds in its own way."""
        if is_quantised(inner._parameters.get(name)):
            place = next(place for place, module in self._tree.modules.items() if module is inner)
            raise ModelError(f"{self._label}: {place}.{name} {why}; a quantised base cannot hold it, 16bit can")

    def _holder(self, module: str, names: Sequence[str]) -> OwnModule | None:
        kind = self._trial.holder(module, names)
        name = self._tree.around(module, kind) if kind else None
        if name is None:
            return None
        inner = self._tree.modules[name]
        if isinstance(self.parts.get(id(inner)), OwnNorm | MixedEmbedding):
            raise AssertionError(f"{name} is a norm or a lookup with parameters of two kinds")
        if id(inner) not in self.parts:
            whole = frozenset(self._trial.kind(name).whole)
            self.parts[id(inner)] = OwnModule(self._state, inner, whole)
        held = self.parts[id(inner)]
        assert isinstance(held, OwnModule)
        return held


def _is_sum_of_weights(part: OwnModule) -> bool:
    """Whether what a module gives for the mean of parameters is the mean of what it gives for each: a lookup or a
    product, none of whose modules has its own."""
    inner = part.inner
    if any(tensor.module is not inner or type(tensor) is not OwnTensor for tensor in part.tensors):
        return False
    names = {tensor.name for tensor in part.tensors}
    return (names == {"weight"} and MixedEmbedding.fits(inner)) or (names <= {"weight", "bias"} and multiplies(inner))
