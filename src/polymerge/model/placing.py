"""Puts every tensor of every adapter into the model, where the trial says that it is right.

Every tensor finds its place exactly once, or loading fails: an adapter is never ignored in silence. Where something
finer would be wrong, a module that can be run for a part of the rows is run once for every expert
(`polymerge.model.holders`). Knows layers, tables, and whole tensors; what is stored in pieces is another module's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle.bundle import Bundle
from ..bundle.layer import BundleLayer
from ..errors import ModelError
from ..sources.forms import in_order
from .assignment import Assignment
from .held import layer_stays_packed
from .holders import Holders, Placed
from .linear import ExpertLinear, MixedLinear
from .lookup import MixedEmbedding, MixedHead, MixedTable
from .multiplies import multiplies
from .own import OwnNorm, OwnTensor, OwnWeight
from .pieces import PiecePlacer
from .quantised import is_quantised
from .stored import StoredResiduals, Values, bundle_forms, orders_of
from .tree import Tree, tensor_of
from .trial import Trial


class Placer:
    """
    Attributes:
        suffixes: what follows a linear module's name in the keys of its residual.
    """

    suffixes: tuple[str, ...] = ("lora_A.weight", "lora_B.weight")

    def __init__(
        self,
        bundle: Bundle,
        hf: Any,
        state: Assignment,
        dtype: torch.dtype,
        trial: Trial,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.bundle, self.hf, self.state, self.trial, self.tree = bundle, hf, state, trial, Tree(hf)
        self.quantised = any(is_quantised(parameter) for parameter in hf.parameters())
        self.linear = {layer.module: layer for layer in bundle.layers.values() if layer.role == "linear"}
        self.tables = {x.module: x for x in bundle.layers.values() if x.rank and x.role != "linear"}
        self.holders = Holders(hf, state, trial, self.tree, str(bundle.path))
        forms = bundle_forms(bundle, hf, rebuilt=self.quantised, trust_remote_code=trust_remote_code)
        self.orders = orders_of(forms)
        self.stored = StoredResiduals(bundle, state.device, dtype, self.orders)
        self.pieces = PiecePlacer(state, trial, self.tree, self.stored, forms, self.holders)

    def place(self) -> Placed:
        """Raises ModelError for a tensor that has no place."""
        self.coded = {module for module in self.linear if self._stays_coded(module)}
        self.stored.read(self.coded)
        modules, layers = self.tree.modules, self.bundle.layers.values()
        for module, layer in self.linear.items():
            if module in modules and self._changes(module, layer):
                self._place_linear(module, layer)
        for module, layer in self.tables.items():
            if module in modules:
                self._place_table(module, layer)
        self._place_pieces({layer.module: layer for layer in layers if layer.module not in modules})
        self._place_own()
        self.stored.check_taken()
        return self.holders.placed()

    def _stays_coded(self, module: str) -> bool:
        """Whether the factors of a linear layer are held as they are stored."""
        return False

    def _place_pieces(self, layers: Mapping[str, BundleLayer]) -> None:
        if layers and self.quantised and self.bundle.manifest.base_code is None:
            raise ModelError(
                f"{self.bundle.path}: {next(iter(layers))} is held with others in one tensor, which is not quantised; "
                "a quantised base cannot hold it, 16bit can"
            )
        self.pieces.place(layers)

    def _changes(self, module: str, layer: BundleLayer) -> bool:
        """Whether the layer is stored against the base; a whole matrix of an expert's own goes the other way."""
        if self.stored.has(f"{module}.{layer.parameter}"):
            return False
        keys = (*(f"{module}.{suffix}" for suffix in self.suffixes), f"{module}.lora_B.bias")
        return any(self.stored.has(key) for key in keys) or any(ratio != 1.0 for ratio in self.stored.ratios(layer))

    def _place_linear(self, module: str, layer: BundleLayer) -> None:
        """As a layer that adds the residuals, where the module is used as a linear layer and nothing else."""
        inner = self.tree.modules[module]
        bias, base = getattr(inner, "bias", None), self._base(inner, layer)
        biases = self.stored.biases(module, bias)
        places = [place for place, _ in self.tree.places(inner.get_parameter("weight"))]
        if self._is_linear(module):
            made = self._linear(layer, base, bias.data if bias is not None else None, biases)
            if isinstance(base, nn.Module):
                inner.register_parameter("bias", None)  # what rho multiplies has none
            if isinstance(made, MixedLinear) and len(places) == 1:
                made.input_of = self.trial.input_of(module)
            for place in places:
                self.tree.replace(place, made)
                if not self.trial.kind(place).plain:
                    self.holders.split_above(place, ["weight", "bias"])
            return
        self.holders.refuse_quantised(inner, "weight", "is used otherwise than to multiply with it")
        factors, ratios, shares = self.stored.factors(module), self.stored.ratios(layer), self.stored.shares(layer)
        dense = MixedLinear(self.state, base, None, factors, ratios, [None] * len(biases), shares)
        for place in places:
            self.holders.hold(place, [OwnWeight(self.tree.modules[place], dense, transposed=layer.transposed)])
        for place, name in self.tree.places(bias) if bias is not None and any(b is not None for b in biases) else ():
            self.holders.hold(place, [OwnTensor(self.tree.modules[place], name, biases)])

    @staticmethod
    def _base(inner: nn.Module, layer: BundleLayer) -> Tensor | nn.Module:
        """A weight [out, in]; or the module itself, where a library holds its weight."""
        weight = inner.get_parameter("weight")
        return inner if is_quantised(weight) else weight.data.T if layer.transposed else weight.data

    def _is_linear(self, module: str) -> bool:
        """Whether a layer, and every other one whose weight is the same parameter, multiplies and does nothing else."""
        inner = self.tree.modules[module]
        if f"{module}.weight" in self.orders and self.linear[module].transposed:
            raise ModelError(f"{module}: its rows are stored in another order; not supported in a transposed layer")
        places = [place for place, _ in self.tree.places(inner.get_parameter("weight"))]
        biases = {id(getattr(self.tree.modules[place], "bias", None)) for place in places}
        return len(biases) == 1 and all(self._multiplies(place) for place in places)

    def _multiplies(self, module: str) -> bool:
        inner = self.tree.modules[module]
        single = self.trial.kind(module).called and self.trial.kind(module).single
        return single and self.trial.read_by_itself(module, ["weight", "bias"]) and multiplies(inner)

    def _linear(
        self, layer: BundleLayer, base: Tensor | nn.Module, bias: Tensor | None, biases: Values
    ) -> ExpertLinear:
        factors, ratios = self.stored.factors(layer.module), self.stored.ratios(layer)
        return MixedLinear(self.state, base, bias, factors, ratios, biases, self.stored.shares(layer))

    def _place_table(self, module: str, layer: BundleLayer) -> None:
        """An embedding, a head, or one that is both: whoever looks its rows up or multiplies with it shares one table.
        What does something else with it has it made whole for one expert at a time."""
        parameter = self.tree.modules[module].get_parameter(layer.parameter)
        own = self.stored.own_rows(layer)
        if not (self._changes(module, layer) or any(own)):
            return
        assert isinstance(parameter, nn.Parameter)
        factors, ratios, shares = self.stored.factors(module), self.stored.ratios(layer), self.stored.shares(layer)
        table = MixedTable(self.state, parameter, factors, ratios, own, shares)
        for place, name in self.tree.places(parameter):
            inner = self.tree.modules[place]
            if name == "weight" and self._multiplies(place):
                self._place_head(place, table)
            elif name == "weight" and self._looks_up(place):
                self.holders.parts[id(inner)] = MixedEmbedding(self.state, inner, table)
            else:
                self.holders.hold(place, [OwnWeight(inner, table, transposed=False, name=name)])

    def _place_head(self, module: str, table: MixedTable) -> None:
        bias = getattr(self.tree.modules[module], "bias", None)
        biases = self.stored.biases(module, bias)
        self.tree.replace(module, MixedHead(table, bias, biases))
        if not self.trial.kind(module).plain:
            self.holders.split_above(module, ["weight", "bias"])

    def _looks_up(self, module: str) -> bool:
        kind, inner = self.trial.kind(module), self.tree.modules[module]
        plain = kind.called and kind.plain and self.trial.read_by_itself(module, ["weight"])
        return plain and id(inner) not in self.holders.parts and MixedEmbedding.fits(inner)

    def _place_own(self) -> None:
        """Whole tensors: by parameter, so that an embedding that is tied to the head changes both."""
        keys = sorted({key for adapter in self.stored.adapters for key in adapter})
        tensors: dict[str, dict[str, Values]] = {}
        for key in keys:
            module, _, name = key.rpartition(".")
            if module in self.tree.modules and (tensor := tensor_of(self.tree.modules[module], name)) is not None:
                values = [in_order(value, self.orders.get(key)) for value in self.stored.take(key)]
                for place, there in self.tree.places(tensor):
                    tensors.setdefault(place, {})[there] = values
        for module, values_of in tensors.items():
            inner = self.tree.modules[module]
            if self._follows_rows(module, inner, values_of):
                self.holders.parts[id(inner)] = OwnNorm(self.state, inner, values_of)
            else:
                self.holders.hold(module, [OwnTensor(inner, name, values) for name, values in values_of.items()])

    def _follows_rows(self, module: str, inner: nn.Module, tensors: Mapping[str, Values]) -> bool:
        kind = self.trial.kind(module)
        return (
            kind.called
            and kind.plain
            and not isinstance(inner, ExpertLinear)
            and id(inner) not in self.holders.parts
            and self.trial.read_by_itself(module, list(tensors))
            and OwnNorm.fits(inner)
        )


class CodedPlacer(Placer):
    """Leaves the factors of linear layers as they are stored. Those inside fused blocks, of layers that are used
    otherwise, of which a row has more than one expert's own, or an expert's are stored as numbers, are decoded all the
    same.

    Attributes:
        fused: as `CodedLinear` takes it.
    """

    fused = False

    def place(self) -> Placed:
        self.suffixes = self.bundle.code.suffixes
        return super().place()

    def _stays_coded(self, module: str) -> bool:
        layer = self.linear[module]
        return (
            layer_stays_packed(module, layer.base, self.tree.modules, self.orders)
            and not layer.numbers
            and not layer.borrowed
            and self._is_linear(module)
        )

    def _changes(self, module: str, layer: BundleLayer) -> bool:
        return self.stored.has(f"{module}.lora_A.weight") or super()._changes(module, layer)

    def _linear(
        self, layer: BundleLayer, base: Tensor | nn.Module, bias: Tensor | None, biases: Values
    ) -> ExpertLinear:
        if layer.module not in self.coded:
            return super()._linear(layer, base, bias, biases)
        from .triton.linear import CodedLinear

        stored = self.stored.coded(layer)
        code, ratios = self.bundle.code, self.stored.ratios(layer)
        return CodedLinear(self.state, base, bias, stored, code, ratios, biases, fused=self.fused)


class FusedPlacer(CodedPlacer):
    """The same, added by the kernels where a batch allows it."""

    fused = True
