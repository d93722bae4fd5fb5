"""What a bundle's adapters hold for the modules of a loaded model, each tensor taken once.

What nobody took is an adapter that would be ignored in part: whoever loads looks for it at the end. Knows stored names,
their order and scales; does not know where they go (`polymerge.model.placing`).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..bundle.adapter import adapter_of
from ..bundle.bundle import Bundle
from ..bundle.layer import BundleLayer, stored_layers
from ..bundle.residuals import coded_factors, popped
from ..errors import ModelError
from ..sources.forms import Part, forms_of, parts_of_slices
from ..sources.layers import meta_model
from .lookup import OwnRows

Values: TypeAlias = list[Tensor | None]
Factors: TypeAlias = list[tuple[Tensor, Tensor] | None]
# Stored name -> the parts of the model's parameters that it holds.
Forms: TypeAlias = dict[str, list[Part]]


class StoredResiduals:
    """The experts' adapters, in the order of the bundle's experts.

    Args:
        orders: as `orders_of` gives them.

    Attributes:
        adapters: what has not been taken.
    """

    def __init__(self, bundle: Bundle, device: torch.device, dtype: torch.dtype, orders: dict[str, Tensor]) -> None:
        self.bundle, self.device, self.dtype, self.orders = bundle, device, dtype, orders
        self.adapters: list[dict[str, Tensor]] = []
        self._scales = [bundle.scales(expert) for expert in bundle.experts]
        self._tables: dict[Hashable, Tensor] = {}

    def read(self, coded: Collection[str]) -> None:
        """All adapters, the factors of these modules as they are stored."""
        experts = self.bundle.experts
        self.adapters = [adapter_of(self.bundle, e, coded=coded, apart=True, dtype=self.dtype) for e in experts]

    def check_taken(self) -> None:
        """Raises ModelError for a tensor that nobody took."""
        for expert, adapter in zip(self.bundle.experts, self.adapters, strict=True):
            if adapter:
                key = next(iter(adapter))
                raise ModelError(
                    f"{self.bundle.path}: tensor {key!r} of expert {expert!r} has no place in the model "
                    f"({len(adapter)} such tensors); the adapter would be ignored in part"
                )

    def has(self, key: str) -> bool:
        """Whether an expert's tensor of that name is still there."""
        return any(key in adapter for adapter in self.adapters)

    def take(self, key: str) -> Values:
        values = [adapter.pop(key, None) for adapter in self.adapters]
        return [value.to(self.device) if value is not None else None for value in values]

    def ratios(self, layer: BundleLayer) -> list[float]:
        return [scales.get(layer.tensor, 1.0) for scales in self._scales]

    def shares(self, layer: BundleLayer) -> Tensor | None:
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

    def factors(self, module: str) -> Factors:
        """(A, B) of every expert in the model's own order of rows."""
        a, b = self.take(f"{module}.lora_A.weight"), self.take(f"{module}.lora_B.weight")
        order = self.orders.get(f"{module}.weight")
        b = [y[order] if y is not None and order is not None else y for y in b]
        pairs = zip(a, b, strict=True)
        return [(x.to(self.dtype), y.to(self.dtype)) if x is not None and y is not None else None for x, y in pairs]

    def coded(self, layer: BundleLayer) -> list[Any]:
        """Factors of a module that was read `coded`, as `coded_factors` gives them."""
        return [
            coded_factors(self.bundle, expert, layer, popped(adapter))
            for expert, adapter in zip(self.bundle.experts, self.adapters, strict=True)
        ]

    def biases(self, module: str, bias: Tensor | None) -> Values:
        """Every expert's own bias. An adapter has a difference of zeros where the layer has none and others have."""
        differences, biases = self.take(f"{module}.lora_B.bias"), self.take(f"{module}.bias")
        if bias is None and any(d is not None and bool(d.any()) for d in differences):
            raise ModelError(f"{module}: an expert has a bias, but the layer has none")
        return [
            value if value is not None else bias.data + d if bias is not None and d is not None else None
            for value, d in zip(biases, differences, strict=True)
        ]

    def own_rows(self, layer: BundleLayer) -> list[OwnRows | None]:
        """What experts have of their own beside the residuals of a table."""
        numbers = [self.bundle.manifest.experts[expert].own_rows for expert in self.bundle.experts]
        values = self.take(f"{layer.module}.{layer.parameter}")
        pairs = zip(numbers, values, strict=True)
        return [OwnRows(torch.tensor(n).to(v.device), v.to(self.dtype)) if v is not None else None for n, v in pairs]


def bundle_forms(bundle: Bundle, hf: nn.Module, *, rebuilt: bool, trust_remote_code: bool) -> Forms:
    """Of every stored name; a matrix that the base stores in one tensor with others has a name too.

    Args:
        rebuilt: a library has put modules of its own in the place of the architecture's, whose rules are looked up.
    """
    stored_as = meta_model(bundle.path, trust_remote_code=trust_remote_code) if rebuilt else hf
    forms = forms_of(stored_as or hf)
    for stored, layers in stored_layers(bundle.layers.values()).items():
        place = layers[0].slice
        for cuts in (parts_of_slices(part, place) for part in forms[stored]) if place else ():
            for layer, cut in zip(layers, cuts, strict=True):
                forms.setdefault(layer.tensor, []).extend([cut] if len(cut.source) else [])
    return forms


def orders_of(forms: Forms) -> dict[str, Tensor]:
    """Parameter -> the stored row of every row of it, where a checkpoint stores them in another order."""
    orders = {}
    for parts in forms.values():
        target, source = parts[0].target, parts[0].source
        whole = len(parts) == 1 and not parts[0].transposed and len(target) == int(target.max()) + 1
        if whole and not torch.equal(target, source):
            orders[parts[0].parameter] = source[target.argsort()]
    return orders
