"""Puts every tensor of every adapter into the model, where the trial says that it is right.

Every tensor finds its place exactly once, or loading fails: an adapter is never ignored in silence. Where something
finer would be wrong, a module that can be run for a part of the rows is run once for every expert; where there is none,
the whole model is.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bundle.bundle import Bundle
from ..bundle.manifest import BundleLayer, stored_layers
from ..errors import ModelError
from ..sources.forms import Part, forms_of, in_order, parts_of_slices
from ..sources.layers import meta_model
from .assignment import Assignment
from .groups import WholeModel
from .linear import ExpertLinear, MixedLinear
from .lookup import MixedEmbedding, MixedHead, MixedTable, OwnRows
from .moe import FusedWeight, Layout, MixedBlockExperts, Piece, SlabResidual, Slabs, layout_of, locate
from .own import OwnModule, OwnNorm, OwnTensor, OwnWeight
from .quantised import is_quantised
from .trial import Trial, kind_of

logger = logging.getLogger(__name__)
Values = list[Tensor | None]


@dataclass(frozen=True)
class Placed:
    """What stands in the place of modules' forwards, and how a mixed batch is run."""

    modules: Sequence[nn.Module]
    strategy: Literal["layers", "groups"]


class Placer:
    """`adapters` holds the tensors that have not found their place.

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
        self.bundle, self.hf, self.state, self.dtype, self.trial = bundle, hf, state, dtype, trial
        self.scales = [bundle.scales(expert) for expert in bundle.experts]
        self.quantised = any(is_quantised(parameter) for parameter in hf.parameters())
        self.trust_remote_code = trust_remote_code
        self.tree = _Tree(hf)
        self.modules = self.tree.modules
        self.linear = {layer.module: layer for layer in bundle.layers.values() if layer.role == "linear"}
        self.tables = {x.module: x for x in bundle.layers.values() if x.rank and x.role != "linear"}
        self.parts: dict[int, OwnModule | OwnNorm | MixedEmbedding] = {}
        self.whole: list[OwnTensor] = []  # that only the whole model can hold
        self.idle: list[OwnTensor] = []  # that a batch of tokens does not use
        self.forms = self._forms()
        self.orders = self._orders()
        self.apart = False
        self._tables: dict[Hashable, Tensor] = {}
        self.adapters = [self._read(expert) for expert in bundle.experts]

    def place(self) -> Placed:
        """Raises ModelError for a tensor that has no place."""
        layers = self.bundle.layers.values()
        pieces = {layer.module: layer for layer in layers if layer.module not in self.modules}
        for module, layer in self.linear.items():
            if module in self.modules and self._changes(module, layer):
                self._place_linear(module, layer)
        for module, layer in self.tables.items():
            if module in self.modules:
                self._place_table(module, layer)
        self._place_pieces(pieces)
        self._place_own()
        for expert, adapter in zip(self.bundle.experts, self.adapters, strict=True):
            if adapter:
                key = next(iter(adapter))
                raise ModelError(
                    f"{self.bundle.path}: tensor {key!r} of expert {expert!r} has no place in the model "
                    f"({len(adapter)} such tensors); the adapter would be ignored in part"
                )
        return self._placed()

    def _placed(self) -> Placed:
        for part in self.parts.values():
            if isinstance(part, OwnModule):
                part.blends = _is_sum_of_weights(part)
        groups = self.apart or bool(self.whole)
        whole = [self._whole(self.hf, groups)]
        if isinstance(self.hf.base_model, nn.Module) and self.hf.base_model is not self.hf:
            whole.append(self._whole(self.hf.base_model, groups))
        if groups:
            logger.info("%s: a mixed batch runs once for every expert", type(self.hf).__name__)
        return Placed([*self.parts.values(), *whole], "groups" if groups else "layers")

    def _whole(self, module: nn.Module, groups: bool) -> WholeModel:
        states = [(self.modules[name], attribute) for name, attribute in self.trial.states]
        whole = WholeModel(self.state, module, split=groups, tried=self.trial.inputs, states=states)
        whole.tensors = [*self.whole, *self.idle]
        return whole

    def _read(self, expert: str) -> dict[str, Tensor]:
        return self.bundle.adapter(expert, apart=True, dtype=self.dtype)

    def _take(self, key: str) -> Values:
        device = self.state.device
        values = [adapter.pop(key, None) for adapter in self.adapters]
        return [value.to(device) if value is not None else None for value in values]

    def _ratios(self, layer: BundleLayer) -> list[float]:
        return [scales.get(layer.tensor, 1.0) for scales in self.scales]

    def _shares(self, layer: BundleLayer) -> Tensor | None:
        """What every expert and the average has of the experts' factors, where that is not each its own: over the model
        under adapters the average has all of them alike, and what is another's too counts as the manifest says."""
        if layer.base == "average" and not layer.borrowed:
            return None
        names = self.bundle.experts
        factored = ((n, lent) for n, lent in layer.borrowed.items() if not layer.lends_whole(n))
        lent = [(names.index(n), names.index(lent.of or n), lent.times) for n, lent in factored]
        key = (layer.base, *lent)
        if key not in self._tables:
            average = 1 / len(names) if layer.base == "adapters" else 0.0
            table = torch.cat([torch.eye(len(names)), torch.full((1, len(names)), average)])
            for row, column, times in lent:
                table[row] = 0.0
                table[row, column] = times
            self._tables[key] = table
        return self._tables[key]

    def _forms(self) -> dict[str, list[Part]]:
        """Stored name -> its parts; a matrix that the base stores in one tensor with others has a name too."""
        stored_as = (
            meta_model(self.bundle.path, trust_remote_code=self.trust_remote_code) if self.quantised else self.hf
        )
        forms = forms_of(stored_as or self.hf)
        for stored, layers in stored_layers(self.bundle.layers.values()).items():
            place = layers[0].slice
            for cuts in (parts_of_slices(part, place) for part in forms[stored]) if place else ():
                for layer, cut in zip(layers, cuts, strict=True):
                    forms.setdefault(layer.tensor, []).extend([cut] if len(cut.source) else [])
        return forms

    def _orders(self) -> dict[str, Tensor]:
        """Parameter -> the stored row of every row of it, where a checkpoint stores them in another order."""
        orders = {}
        for parts in self.forms.values():
            target, source = parts[0].target, parts[0].source
            whole = len(parts) == 1 and not parts[0].transposed and len(target) == int(target.max()) + 1
            if whole and not torch.equal(target, source):
                orders[parts[0].parameter] = source[target.argsort()]
        return orders

    def _factors(self, module: str) -> list[tuple[Tensor, Tensor] | None]:
        a, b = self._take(f"{module}.lora_A.weight"), self._take(f"{module}.lora_B.weight")
        order = self.orders.get(f"{module}.weight")
        b = [y[order] if y is not None and order is not None else y for y in b]
        pairs = zip(a, b, strict=True)
        return [(x.to(self.dtype), y.to(self.dtype)) if x is not None and y is not None else None for x, y in pairs]

    def _changes(self, module: str, layer: BundleLayer) -> bool:
        """Whether the layer is stored against the base; a whole matrix of an expert's own goes the other way."""
        if any(f"{module}.{layer.parameter}" in adapter for adapter in self.adapters):
            return False
        keys = (*(f"{module}.{suffix}" for suffix in self.suffixes), f"{module}.lora_B.bias")
        stored = any(key in adapter for adapter in self.adapters for key in keys)
        return stored or any(ratio != 1.0 for ratio in self._ratios(layer))

    def _place_linear(self, module: str, layer: BundleLayer) -> None:
        """As a layer that adds the residuals, where the module is used as a linear layer and nothing else."""
        inner = self.modules[module]
        bias, base = getattr(inner, "bias", None), self._base(inner, layer)
        biases = self._biases(module, bias)
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
                    self._split_above(place, ["weight", "bias"])
            return
        self._refuse_quantised(inner, "weight", "is used otherwise than to multiply with it")
        factors, ratios, shares = self._factors(module), self._ratios(layer), self._shares(layer)
        dense = MixedLinear(self.state, base, None, factors, ratios, [None] * len(biases), shares)
        for place in places:
            self._hold(place, [OwnWeight(self.modules[place], dense, transposed=layer.transposed)])
        for place, name in self.tree.places(bias) if bias is not None and any(b is not None for b in biases) else ():
            self._hold(place, [OwnTensor(self.modules[place], name, biases)])

    @staticmethod
    def _base(inner: nn.Module, layer: BundleLayer) -> Tensor | nn.Module:
        """A weight [out, in]; or the module itself, where a library holds its weight."""
        weight = inner.get_parameter("weight")
        return inner if is_quantised(weight) else weight.data.T if layer.transposed else weight.data

    def _refuse_quantised(self, inner: nn.Module, name: str, why: str) -> None:
        if is_quantised(inner._parameters.get(name)):
            place = next(place for place, module in self.modules.items() if module is inner)
            raise ModelError(f"{self.bundle.path}: {place}.{name} {why}; a quantised base cannot hold it, 16bit can")

    def _is_linear(self, module: str) -> bool:
        """Whether a layer, and every other one whose weight is the same parameter, multiplies and does nothing else."""
        inner = self.modules[module]
        if f"{module}.weight" in self.orders and self.linear[module].transposed:
            raise ModelError(f"{module}: its rows are stored in another order; not supported in a transposed layer")
        places = [place for place, _ in self.tree.places(inner.get_parameter("weight"))]
        biases = {id(getattr(self.modules[place], "bias", None)) for place in places}
        return len(biases) == 1 and all(self._multiplies(place) for place in places)

    def _multiplies(self, module: str) -> bool:
        inner = self.modules[module]
        single = self.trial.kind(module).called and self.trial.kind(module).single
        return single and self.trial.read_by_itself(module, ["weight", "bias"]) and _multiplies(inner)

    def _biases(self, module: str, bias: Tensor | None) -> Values:
        """Every expert's own bias. An adapter has a difference of zeros where the layer has none and others have."""
        differences, biases = self._take(f"{module}.lora_B.bias"), self._take(f"{module}.bias")
        if bias is None and any(d is not None and bool(d.any()) for d in differences):
            raise ModelError(f"{module}: an expert has a bias, but the layer has none")
        return [
            value if value is not None else bias.data + d if bias is not None and d is not None else None
            for value, d in zip(biases, differences, strict=True)
        ]

    def _linear(
        self, layer: BundleLayer, base: Tensor | nn.Module, bias: Tensor | None, biases: Values
    ) -> ExpertLinear:
        factors, ratios, shares = self._factors(layer.module), self._ratios(layer), self._shares(layer)
        return MixedLinear(self.state, base, bias, factors, ratios, biases, shares)

    def _place_table(self, module: str, layer: BundleLayer) -> None:
        """An embedding, a head, or one that is both: whoever looks its rows up or multiplies with it shares one table.
        What does something else with it has it made whole for one expert at a time."""
        parameter = self.modules[module].get_parameter(layer.parameter)
        own = self._own_rows(layer)
        if not (self._changes(module, layer) or any(own)):
            return
        assert isinstance(parameter, nn.Parameter)
        factors, ratios, shares = self._factors(module), self._ratios(layer), self._shares(layer)
        table = MixedTable(self.state, parameter, factors, ratios, own, shares)
        for place, name in self.tree.places(parameter):
            inner = self.modules[place]
            if name == "weight" and self._multiplies(place):
                self._place_head(place, table)
            elif name == "weight" and self._looks_up(place):
                self.parts[id(inner)] = MixedEmbedding(self.state, inner, table)
            else:
                self._hold(place, [OwnWeight(inner, table, transposed=False, name=name)])

    def _place_head(self, module: str, table: MixedTable) -> None:
        bias = getattr(self.modules[module], "bias", None)
        biases = self._biases(module, bias)
        self.tree.replace(module, MixedHead(table, bias, biases))
        if not self.trial.kind(module).plain:
            self._split_above(module, ["weight", "bias"])

    def _looks_up(self, module: str) -> bool:
        kind, inner = self.trial.kind(module), self.modules[module]
        plain = kind.called and kind.plain and self.trial.read_by_itself(module, ["weight"])
        return plain and id(inner) not in self.parts and MixedEmbedding.fits(inner)

    def _own_rows(self, layer: BundleLayer) -> list[OwnRows | None]:
        """What experts have of their own beside the residuals of a table."""
        numbers = [self.bundle.manifest.experts[expert].own_rows for expert in self.bundle.experts]
        values = self._take(f"{layer.module}.{layer.parameter}")
        pairs = zip(numbers, values, strict=True)
        return [OwnRows(torch.tensor(n).to(v.device), v.to(self.dtype)) if v is not None else None for n, v in pairs]

    def _place_own(self) -> None:
        """Whole tensors: by parameter, so that an embedding that is tied to the head changes both."""
        keys = sorted({key for adapter in self.adapters for key in adapter})
        tensors: dict[str, dict[str, Values]] = {}
        for key in keys:
            module, _, name = key.rpartition(".")
            if module in self.modules and (tensor := _tensor_of(self.modules[module], name)) is not None:
                values = [in_order(value, self.orders.get(key)) for value in self._take(key)]
                for place, there in self.tree.places(tensor):
                    tensors.setdefault(place, {})[there] = values
        for module, values_of in tensors.items():
            inner = self.modules[module]
            if self._follows_rows(module, inner, values_of):
                self.parts[id(inner)] = OwnNorm(self.state, inner, values_of)
            else:
                self._hold(module, [OwnTensor(inner, name, values) for name, values in values_of.items()])

    def _follows_rows(self, module: str, inner: nn.Module, tensors: Mapping[str, Values]) -> bool:
        kind = self.trial.kind(module)
        return (
            kind.called
            and kind.plain
            and not isinstance(inner, ExpertLinear)
            and id(inner) not in self.parts
            and self.trial.read_by_itself(module, list(tensors))
            and OwnNorm.fits(inner)
        )

    def _hold(self, module: str, tensors: Sequence[OwnTensor]) -> None:
        """Gives parameters of a module to the innermost one around them that can be run apart for some rows."""
        names = [tensor.name for tensor in tensors]
        for tensor in tensors:
            self._refuse_quantised(tensor.module, tensor.name, "is an expert's own")
        if self.trial.is_idle(module, names):
            self.idle += tensors
            return
        holder = self._holder(module, names)
        if holder is None:
            self.whole += tensors
        else:
            holder.tensors += tensors

    def _split_above(self, module: str, names: Sequence[str]) -> None:
        """Rows are told apart further up than in a layer that does not see them as they are."""
        self.apart |= self._holder(module, names) is None

    def _holder(self, module: str, names: Sequence[str]) -> OwnModule | None:
        kind = self.trial.holder(module, names)
        name = self.tree.around(module, kind) if kind else None
        if name is None:
            return None
        inner = self.modules[name]
        if isinstance(self.parts.get(id(inner)), OwnNorm | MixedEmbedding):
            raise AssertionError(f"{name} is a norm or a lookup with parameters of two kinds")
        if id(inner) not in self.parts:
            whole = frozenset(self.trial.kind(name).whole)
            self.parts[id(inner)] = OwnModule(self.state, inner, whole)
        held = self.parts[id(inner)]
        assert isinstance(held, OwnModule)
        return held

    def _place_pieces(self, layers: Mapping[str, BundleLayer]) -> None:
        """Parameters that a checkpoint stores in pieces, or several in one tensor.

        Args:
            layers: the bundle's, by the name of what is stored without `.weight`.
        """
        pieces: dict[str, list[tuple[str, Piece]]] = {}
        if layers and self.quantised:
            raise ModelError(
                f"{self.bundle.path}: {next(iter(layers))} is held with others in one tensor, which is not quantised; "
                "a quantised base cannot hold it, 16bit can"
            )
        for stored, parts in self.forms.items() if layers else ():
            layer = layers.get(stored.removesuffix(".weight"))
            if layer is None:
                continue
            tensors, factors = self._take(f"{layer.module}.{layer.parameter}"), self._factors(layer.module)
            self._biases(layer.module, None)
            for part in parts:
                module, _, leaf = part.parameter.rpartition(".")
                parameter = self.modules[module].get_parameter(leaf)
                whole = [v.to(parameter.dtype) if v is not None else None for v in tensors]
                ratios, shares = self._ratios(layer), self._shares(layer)
                piece = Piece.of(part, factors, ratios, whole, transposed=layer.transposed, shares=shares)
                self._check_piece(parameter, part, layer)
                pieces.setdefault(module, []).append((leaf, piece))
        for module, of_module in pieces.items():
            self._place_module(module, of_module)

    def _place_module(self, module: str, pieces: Sequence[tuple[str, Piece]]) -> None:
        inner = self.modules[module]
        names = sorted({name for name, _ in pieces})
        tied = [name for name in names if len(self.tree.places(inner.get_parameter(name))) > 1]
        if tied:
            raise ModelError(
                f"{module}.{tied[0]} is stored in pieces, and another module's parameter too; not supported"
            )
        if (block := self._block(module, pieces)) is not None:
            self.tree.replace(module, block)
            if not self.trial.kind(module).rows:
                self._split_above(module, names)
            return
        of = {name: [piece for leaf, piece in pieces if leaf == name] for name in names}
        self._hold(module, [FusedWeight(inner, name, of[name]) for name in names])

    def _block(self, module: str, pieces: Sequence[tuple[str, Piece]]) -> MixedBlockExperts | None:
        """The pieces as matrices of block experts; None where the module is no block that is computed from them."""
        inner, kind = self.modules[module], self.trial.kind(module)
        layout = layout_of(inner) if kind.called else None
        if layout is None or not self.trial.read_by_itself(module, sorted(layout.parameters)):
            return None
        slabs = self._slabs(inner, pieces, layout)
        if slabs is None:
            return None
        taken = {name: self._take(f"{module}.{bias}") for name, bias in layout.biases.items()}
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
            self.bundle.base.read(layer.tensor)
            if len(layer.shape) > 2
            else (self.bundle.base.read_rows(layer.tensor, row, row + 1))
        )
        expected = stored.reshape(-1, stored.shape[-1])[row if len(layer.shape) > 2 else 0]
        here = parameter.detach().reshape(-1, parameter.shape[-1])[part.target[0]]
        if not torch.equal(here, expected.to(here)):
            raise ModelError(f"{layer.tensor}: the loaded model does not hold it where transformers' rules say")


class CodedPlacer(Placer):
    """Leaves the factors of linear layers as they are stored. Those inside fused blocks, of layers that are used
    otherwise, of which a row has more than one expert's own, or an expert's are stored as numbers, are decoded all the
    same.

    Attributes:
        fused: as `CodedLinear` takes it.
    """

    fused = False

    def _read(self, expert: str) -> dict[str, Tensor]:
        self.suffixes = self.bundle.code.suffixes
        kept = {
            module
            for module in self.linear.keys() & self.modules.keys()
            if f"{module}.weight" not in self.orders
            and self._shares(self.linear[module]) is None
            and not self.linear[module].numbers
            and self._is_linear(module)
        }
        return self.bundle.adapter(expert, coded=kept, apart=True, dtype=self.dtype)

    def _changes(self, module: str, layer: BundleLayer) -> bool:
        decoded = any(f"{module}.lora_A.weight" in adapter for adapter in self.adapters)
        return decoded or super()._changes(module, layer)

    def _linear(
        self, layer: BundleLayer, base: Tensor | nn.Module, bias: Tensor | None, biases: Values
    ) -> ExpertLinear:
        if f"{layer.module}.weight" in self.orders or layer.numbers or self._shares(layer) is not None:
            return super()._linear(layer, base, bias, biases)
        from .triton.linear import CodedLinear

        stored = [
            self.bundle.coded_factors(expert, layer, lambda key, tensors=adapter: tensors.pop(key, None))  # type: ignore[misc]
            for expert, adapter in zip(self.bundle.experts, self.adapters, strict=True)
        ]
        code, ratios = self.bundle.code, self._ratios(layer)
        return CodedLinear(self.state, base, bias, stored, code, ratios, biases, fused=self.fused)


class FusedPlacer(CodedPlacer):
    """The same, added by the kernels where a batch allows it."""

    fused = True


class _Tree:
    """Where modules and parameters are in the model, as it was before anything was replaced. One may be in many
    places."""

    def __init__(self, hf: nn.Module) -> None:
        self.modules = dict(hf.named_modules(remove_duplicate=False))
        self._names: dict[int, list[str]] = {}
        self._places: dict[int, list[tuple[str, str]]] = {}
        for name, module in self.modules.items():
            self._names.setdefault(id(module), []).append(name)
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and self._names[id(module)] == [name]:
                    self._places.setdefault(id(tensor), []).append((name, leaf))

    def places(self, tensor: Tensor) -> list[tuple[str, str]]:
        """(module, name) of everything that holds this parameter."""
        return self._places[id(tensor)]

    def replace(self, name: str, module: nn.Module) -> None:
        """Puts a module in all places of another."""
        replaced = self.modules[name]
        for attribute, value in vars(replaced).items():  # what its users ask it: in_features and the like
            if isinstance(value, int | float | str) and attribute not in vars(module):
                setattr(module, attribute, value)
        for place in self._names[id(replaced)]:
            parent, _, leaf = place.rpartition(".")
            owner: Any = self.modules[parent]
            setattr(owner, leaf, module)

    def around(self, name: str, kind: str) -> str | None:
        """The module of that kind that holds this one, or is it; None where this one is reached by other ways too."""
        ways = [self._above(place, kind) for place in self._names[id(self.modules[name])]]
        first = ways[0]
        same = first is not None and all(way and self.modules[way] is self.modules[first] for way in ways)
        return first if same else None

    @staticmethod
    def _above(name: str, kind: str) -> str | None:
        while name and kind_of(name) != kind:
            name = name.rpartition(".")[0]
        return name or None


def _is_sum_of_weights(part: OwnModule) -> bool:
    """Whether what a module gives for the mean of parameters is the mean of what it gives for each: a lookup or a
    product, none of whose modules has its own."""
    inner = part.inner
    if any(tensor.module is not inner or type(tensor) is not OwnTensor for tensor in part.tensors):
        return False
    names = {tensor.name for tensor in part.tensors}
    return (names == {"weight"} and MixedEmbedding.fits(inner)) or (names <= {"weight", "bias"} and _multiplies(inner))


def _tensor_of(module: nn.Module, name: str) -> Tensor | None:
    parameter = module._parameters.get(name)
    return parameter if parameter is not None else module._buffers.get(name)


def _multiplies(inner: nn.Module) -> bool:
    """Tries whether a module gives the product with its weight, and its bias, and nothing else."""
    from transformers.pytorch_utils import Conv1D

    if type(inner) in (nn.Linear, Conv1D):
        return True
    if not isinstance(inner, nn.Linear):
        return False
    weight, bias = inner.get_parameter("weight"), getattr(inner, "bias", None)
    if is_quantised(weight):
        return True
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            return torch.allclose(inner(x), nn.functional.linear(x, weight, bias), rtol=1e-3, atol=1e-3)
    except Exception:  # it wants something else
        return False
