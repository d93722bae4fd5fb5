"""Bytes of N experts with everything that they need: on disk, in memory as they run, and in a GGUF.

What is not coded counts 16 bits a number, whatever it was measured in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from polymerge.bundle.bundle import Bundle
from polymerge.model.mixed import MixedModel
from polymerge.model.own import OwnTensor

HALF = 2


@dataclass(frozen=True)
class Sizes:
    """Bytes. `gguf` is None where the method cannot be expressed in one."""

    disk: int
    resident: int
    gguf: int | None

    def __add__(self, other: Sizes) -> Sizes:
        gguf = None if self.gguf is None or other.gguf is None else self.gguf + other.gguf
        return Sizes(self.disk + other.disk, self.resident + other.resident, gguf)


def in_half(numbers: int, *, gguf: bool = True) -> Sizes:
    """Numbers that every place holds in 16 bits. Args: gguf: False for an expert's own, which no adapter can hold."""
    return Sizes(HALF * numbers, HALF * numbers, HALF * numbers if gguf else None)


def bundle_sizes(bundle: Bundle, model: MixedModel, *, own_tables: bool) -> Sizes:
    """Of a bundle and of the model that it is loaded into.

    In a GGUF: the base in float16 and an adapter an expert, of every matrix with factors. Scales and norms are folded
    into the adapters there.

    Args:
        own_tables: experts have embeddings of their own, which no adapter can hold.
    """
    disk = sum(_stored(file) for file in bundle.path.rglob("*.safetensors"))
    layers = bundle.layers.values()
    base = sum(torch.Size(layer.shape).numel() for layer in layers)
    adapters = sum(
        layer.ranks.get(expert, layer.rank) * sum(layer.shape) for layer in layers for expert in bundle.experts
    )
    return Sizes(disk, held_bytes(model), None if own_tables else HALF * (base + adapters))


def _stored(file: Any) -> int:
    with safe_open(file, "pt") as tensors:
        return sum(_in_half(tensors.get_tensor(key)) for key in tensors.keys())  # noqa: SIM118


def held_bytes(model: nn.Module) -> int:
    """Of every tensor that a model's modules hold, wherever, each storage once."""
    storages: dict[int, int] = {}
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            storage = tensor.untyped_storage()
            numbers = storage.nbytes() // tensor.element_size()
            storages[storage.data_ptr()] = numbers * (HALF if tensor.is_floating_point() else tensor.element_size())
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if hasattr(value, "qdata"):  # torchao's tensors, which have no storage themselves
        yield from (value.qdata, value.scale)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, OwnTensor):  # an expert's own norms and tables
        yield from _tensors(value.values)


def _in_half(tensor: Tensor) -> int:
    """float32 as if it were stored in 16 bits; codes as they are."""
    size = min(tensor.element_size(), HALF) if tensor.is_floating_point() else tensor.element_size()
    return tensor.numel() * size
