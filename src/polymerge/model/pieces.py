"""Puts residuals into parameters that a checkpoint stores in pieces, or several in one tensor: block experts, fused
projections.

Knows where the rows of a stored matrix go; does not know layers that are stored as they are used
(`polymerge.model.placing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..bundle.layer import BundleLayer
from ..errors import ModelError
from ..sources.forms import Part
from .assignment import Assignment
from .holders import Holders
from .moe import FusedWeight, Layout, MixedBlockExperts, Piece, SlabResidual, Slabs, layout_of, locate
from .stored import Forms, StoredResiduals
from .tree import Tree
from .trial import Trial


class PiecePlacer:
    """For one model."""

    def __init__(
        self, state: Assignment, trial: Trial, tree: Tree, stored: StoredResiduals, forms: Forms, holders: Holders
    ) -> None:
        self.state, self.trial, self.tree = state, trial, tree
        self.stored, self.forms, self.holders = stored, forms, holders

    def place(self, layers: Mapping[str, BundleLayer]) -> None:
        """Parameters that a checkpoint stores in pieces, or several in one tensor.

        Args:
            layers: the bundle's, by the name of what is stored without `.weight`.
        """
        pieces: dict[str, list[tuple[str, Piece]]] = {}
        for stored, parts in self.forms.items() if layers else ():
            layer = layers.get(stored.removesuffix(".weight"))
            if layer is None:
                continue
            tensors, factors = self.stored.take(f"{layer.module}.{layer.parameter}"), self.stored.factors(layer.module)
            self.stored.biases(layer.module, None)
            for part in parts:
                module, _, leaf = part.parameter.rpartition(".")
                parameter = self.tree.modules[module].get_parameter(leaf)
                whole = [v.to(parameter.dtype) if v is not None else None for v in tensors]
                ratios, shares = self.stored.ratios(layer), self.stored.shares(layer)
                piece = Piece.of(part, factors, ratios, whole, transposed=layer.transposed, shares=shares)
                self._check_piece(parameter, part, layer)
                pieces.setdefault(module, []).append((leaf, piece))
        for module, of_module in pieces.items():
            self._place_module(module, of_module)

    def _place_module(self, module: str, pieces: Sequence[tuple[str, Piece]]) -> None:
        inner = self.tree.modules[module]
        names = sorted({name for name, _ in pieces})
        tied = [name for name in names if len(self.tree.places(inner.get_parameter(name))) > 1]
        if tied:
            raise ModelError(
                f"{module}.{tied[0]} is stored in pieces, and another module's parameter too; not supported"
            )
        if (block := self._block(module, pieces)) is not None:
            self.tree.replace(module, block)
            if not self.trial.kind(module).rows:
                self.holders.split_above(module, names)
            return
        of = {name: [piece for leaf, piece in pieces if leaf == name] for name in names}
        self.holders.hold(module, [FusedWeight(inner, name, of[name]) for name in names])

    def _block(self, module: str, pieces: Sequence[tuple[str, Piece]]) -> MixedBlockExperts | None:
        """The pieces as matrices of block experts; None where the module is no block that is computed from them."""
        inner, kind = self.tree.modules[module], self.trial.kind(module)
        layout = layout_of(inner) if kind.called else None
        if layout is None or not self.trial.read_by_itself(module, sorted(layout.parameters)):
            return None
        slabs = self._slabs(inner, pieces, layout)
        if slabs is None:
            return None
        taken = {name: self.stored.take(f"{module}.{bias}") for name, bias in layout.biases.items()}
        biases = {name: values for name, values in taken.items() if any(value is not None for value in values)}
        return MixedBlockExperts(self.state, inner, slabs, layout, biases)

    @staticmethod
    def _slabs(inner: nn.Module, pieces: Sequence[tuple[str, Piece]], layout: Layout) -> Slabs | None:
        slabs: Slabs = {}
        for leaf, piece in pieces:
            height = inner.get_parameter(leaf).shape[1]
            place = locate(piece.target, height)
            if place is None or (layout.transposed and place[1] != slice(0, height)):
                return None
            residual = SlabResidual(place[1], piece.factors, piece.ratios, piece.matrices, piece.shares)
            slabs.setdefault((leaf, place[0]), []).append(residual.turned() if layout.transposed else residual)
        return slabs

    def _check_piece(self, parameter: Tensor, part: Part, layer: BundleLayer) -> None:
        if part.transposed:
            return
        row = int(part.source[0])
        stored = (
            self.stored.bundle.base.read(layer.tensor)
            if len(layer.shape) > 2
            else (self.stored.bundle.base.read_rows(layer.tensor, row, row + 1))
        )
        expected = stored.reshape(-1, stored.shape[-1])[row if len(layer.shape) > 2 else 0]
        here = parameter.detach().reshape(-1, parameter.shape[-1])[part.target[0]]
        if not torch.equal(here, expected.to(here)):
            raise ModelError(f"{layer.tensor}: the loaded model does not hold it where transformers' rules say")
