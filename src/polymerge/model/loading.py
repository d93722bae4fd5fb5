"""From a bundle to a running model: transformers loads the base, then every layer that an expert changes is replaced.

Every tensor of every adapter finds its place exactly once, or loading fails: an adapter is never ignored in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..bundle.bundle import Bundle
from ..bundle.manifest import BundleLayer
from ..bundle.reading import steady
from ..errors import ModelError
from ..host import DTYPES, pick_device, pick_dtype
from .assignment import Assignment
from .linear import ExpertLinear, MixedLinear
from .mixed import MixedModel
from .moe import MixedBlockExperts, SlabResidual, Slabs, as_sequence, check_layout, locate_slabs
from .own import wrap_own
from .triton.check import objection
from .triton.linear import CodedLinear

logger = logging.getLogger(__name__)
Kernel = Literal["plain", "triton"]


def load_model(
    bundle: Bundle | str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    kernel: Kernel = "plain",
) -> MixedModel:
    """Loads a bundle as one torch module whose every row of a batch has its own expert.

    Args:
        device: by default the GPU where there is one.
        dtype: by default float32 on a CPU (bfloat16 products are hundreds of times slower on most) and the
            bundle's own on a GPU.
        trust_remote_code: let the bundle's own modelling code run, for architectures that transformers does not know.
        kernel: `triton` leaves the factors of linear layers in memory as they are stored, and adds them with a kernel
            that reads their code. It is checked first; where it cannot be used, a warning says why and the model is
            the plain one, whose factors are decoded.

    Raises:
        BundleError: incomplete or unsafe, or changed by another process meanwhile. ModelError: an adapter holds
            something that has no place in the model, or an unknown kernel.
    """
    bundle = Bundle.open(bundle)
    with steady(bundle):
        return _loaded(bundle, device, dtype, trust_remote_code, kernel)


def _loaded(
    bundle: Bundle,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    trust_remote_code: bool,
    kernel: Kernel,
) -> MixedModel:
    from transformers import AutoModelForCausalLM

    bundle.base  # noqa: B018 (its index is checked before transformers joins paths with it)
    place = pick_device(device)
    chosen = pick_dtype(dtype, place, DTYPES[bundle.manifest.dtype])
    placer = _CodedPlacer if _uses_kernel(kernel, bundle, place, chosen) else _Placer
    try:
        hf = AutoModelForCausalLM.from_pretrained(
            bundle.path, dtype=chosen, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # an unknown architecture, or a configuration that the weights do not fit
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{bundle.path}: transformers cannot load it ({reason})") from None
    hf.eval().requires_grad_(False)
    state = Assignment(bundle.experts, place)
    placer(bundle, hf, state, chosen).place()
    return MixedModel(hf.to(place), state, bundle)


def _uses_kernel(kernel: Kernel, bundle: Bundle, device: torch.device, dtype: torch.dtype) -> bool:
    if kernel not in get_args(Kernel):
        raise ModelError(f"kernel: {kernel!r} is neither {' nor '.join(get_args(Kernel))}")
    if kernel == "plain":
        return False
    shapes = [layer.matrix_shape for layer in bundle.layers.values() if layer.rank]
    reason = objection(shapes, bundle.code, device, dtype)
    if reason:
        logger.warning("the Triton kernel is not used: %s; factors are decoded, as with kernel='plain'", reason)
    return not reason


class _Placer:
    """Puts every adapter's tensors into the model. `adapters` holds those that have not found their place.

    Attributes:
        suffixes: what follows a linear module's name in the keys of its residual.
    """

    suffixes: tuple[str, ...] = ("lora_A.weight", "lora_B.weight")

    def __init__(self, bundle: Bundle, hf: nn.Module, state: Assignment, dtype: torch.dtype) -> None:
        self.bundle, self.hf, self.state, self.dtype = bundle, hf, state, dtype
        self.scales = [bundle.scales(expert) for expert in bundle.experts]
        self.modules = dict(hf.named_modules())
        self.linear = {layer.module: layer for layer in bundle.layers.values() if layer.role == "linear"}
        self.adapters = [self._read(expert) for expert in bundle.experts]

    def place(self) -> None:
        fused = {name: layer for name, layer in self.linear.items() if name not in self.modules}
        for module, layer in self.linear.items():
            if module in self.modules and self._changes(module, layer):
                self._place_linear(module, layer)
        self._place_fused(fused)
        self._place_own()
        for expert, adapter in zip(self.bundle.experts, self.adapters, strict=True):
            if adapter:
                key = next(iter(adapter))
                raise ModelError(
                    f"{self.bundle.path}: tensor {key!r} of expert {expert!r} has no place in the model "
                    f"({len(adapter)} such tensors); the adapter would be ignored in part"
                )

    def _read(self, expert: str) -> dict[str, Tensor]:
        return {key: value.to(self.dtype) for key, value in self.bundle.adapter(expert).items()}

    def _take(self, key: str) -> list[Tensor | None]:
        return [adapter.pop(key, None) for adapter in self.adapters]

    def _ratios(self, layer: BundleLayer) -> list[float]:
        return [scales.get(layer.tensor, 1.0) for scales in self.scales]

    def _factors(self, module: str) -> list[tuple[Tensor, Tensor] | None]:
        a, b = self._take(f"{module}.lora_A.weight"), self._take(f"{module}.lora_B.weight")
        return [(x, y) if x is not None and y is not None else None for x, y in zip(a, b, strict=True)]

    def _changes(self, module: str, layer: BundleLayer) -> bool:
        """Whether the layer is stored against the base; a whole matrix of an expert's own goes the other way."""
        if any(f"{module}.{layer.parameter}" in adapter for adapter in self.adapters):
            return False
        keys = (*(f"{module}.{suffix}" for suffix in self.suffixes), f"{module}.lora_B.bias")
        stored = any(key in adapter for adapter in self.adapters for key in keys)
        return stored or any(ratio != 1.0 for ratio in self._ratios(layer))

    def _place_linear(self, module: str, layer: BundleLayer) -> None:
        inner = self.modules[module]
        weight, bias = inner.get_parameter("weight").data, getattr(inner, "bias", None)
        differences, own = self._take(f"{module}.lora_B.bias"), self._take(f"{module}.bias")
        biases = [
            value if value is not None else bias.data + d if bias is not None and d is not None else None
            for value, d in zip(own, differences, strict=True)
        ]
        if bias is None and any(d is not None and bool(d.any()) for d in differences):
            raise ModelError(f"{module}: an expert has a bias, but the layer has none")
        weight = weight.T if layer.transposed else weight
        self._replace(module, self._linear(layer, weight, bias.data if bias is not None else None, biases))

    def _linear(
        self, layer: BundleLayer, weight: Tensor, bias: Tensor | None, biases: list[Tensor | None]
    ) -> ExpertLinear:
        return MixedLinear(self.state, weight, bias, self._factors(layer.module), self._ratios(layer), biases)

    def _place_own(self) -> None:
        """Whole tensors: by parameter, so that an embedding that is tied to the head changes both."""
        keys = sorted({key for adapter in self.adapters for key in adapter})
        own: dict[str, list[dict[str, Tensor]]] = {}
        owners = self._owners()
        for key in keys:
            module, _, parameter = key.rpartition(".")
            found = self.modules.get(module)
            if found is None or parameter not in dict(found.named_parameters(recurse=False)):
                continue
            values = self._take(key)
            for place, name in owners[id(found.get_parameter(parameter))]:
                sets = own.setdefault(place, [{} for _ in self.adapters])
                for expert, value in zip(sets, values, strict=True):
                    if value is not None:
                        expert[name] = value
        for module, sets in own.items():
            self._replace(module, wrap_own(self.state, self.modules[module], sets))

    def _owners(self) -> dict[int, list[tuple[str, str]]]:
        owners: dict[int, list[tuple[str, str]]] = {}
        for module, found in self.hf.named_modules():
            for name, parameter in found.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append((module, name))
        return owners

    def _place_fused(self, layers: Mapping[str, BundleLayer]) -> None:
        if not layers:
            return
        slabs: dict[str, Slabs] = {}
        for name, parameter in list(self.hf.named_parameters()):
            if parameter.dim() != 3:
                continue
            module, _, leaf = name.rpartition(".")
            check_layout(self.modules[module])
            for stored, (block, rows) in self._slab_places(name, parameter).items():
                layer = layers.get(stored.removesuffix(".weight"))
                if layer is None:
                    continue
                own = self._take(f"{layer.module}.{layer.parameter}")
                residual = SlabResidual(rows, self._factors(layer.module), self._ratios(layer), as_sequence(own))
                self._check_slab(parameter[block, rows], layer)
                slabs.setdefault(module, {}).setdefault((leaf, block), []).append(residual)
        for module, found in slabs.items():
            self._replace(module, MixedBlockExperts(self.state, self.modules[module], found))

    def _slab_places(self, name: str, parameter: Tensor) -> dict[str, tuple[int, slice]]:
        """Runs transformers' own conversion on the numbers of the rows, to see where each stored matrix lies."""
        from transformers.core_model_loading import revert_weight_conversion

        blocks, rows, _ = parameter.shape
        numbers = torch.arange(blocks * rows, dtype=torch.float64).view(blocks, rows, 1)
        return locate_slabs(revert_weight_conversion(self.hf, {name: numbers}), rows)

    def _check_slab(self, slab: Tensor, layer: BundleLayer) -> None:
        stored = self.bundle.base.read_rows(layer.tensor, 0, 1).to(slab)
        if not torch.equal(slab[:1], stored):
            raise ModelError(f"{layer.tensor}: the loaded model does not hold it where transformers' rules say")

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        owner: Any = self.hf.get_submodule(parent) if parent else self.hf
        setattr(owner, leaf, module)


class _CodedPlacer(_Placer):
    """Leaves the factors of linear layers as they are stored. Those inside fused blocks are decoded all the same."""

    def _read(self, expert: str) -> dict[str, Tensor]:
        self.suffixes = self.bundle.code.suffixes
        kept = self.linear.keys() & self.modules.keys()
        stored = {f"{module}.{suffix}" for module in kept for suffix in self.suffixes}
        adapter = self.bundle.adapter(expert, coded=kept)
        return {key: value if key in stored else value.to(self.dtype) for key, value in adapter.items()}

    def _linear(
        self, layer: BundleLayer, weight: Tensor, bias: Tensor | None, biases: list[Tensor | None]
    ) -> ExpertLinear:
        stored = [
            self.bundle.coded_factors(expert, layer, lambda key, own=adapter: own.pop(key, None))  # type: ignore[misc]
            for expert, adapter in zip(self.bundle.experts, self.adapters, strict=True)
        ]
        return CodedLinear(self.state, weight, bias, stored, self.bundle.code, self._ratios(layer), biases)
