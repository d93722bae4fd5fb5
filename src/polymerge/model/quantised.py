"""A base in fewer bits than the bundle stores: which library quantises it, through transformers' own configuration.

The residuals stay as they are and are added to what the library's layers give; fitting them anew around a rounded base
spends their rank on noise (docs/log.md). Knows names and libraries; does not know
layers (`polymerge.model.placing`) or what it costs (`polymerge.model.divergence`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..errors import MissingExtraError, ModelError, install_line
from ..host import dtype_name
from ..recipe.response import Base as Base

EXTRA = "quantized"


@dataclass(frozen=True)
class Quantiser:
    """One way to hold the linear layers.

    Attributes:
        library: that does it.
        bits: of a weight in memory, its share of the scales included.
    """

    library: str
    bits: float


# int4 has one scale and one zero for 128 weights; nf4 one for 64, itself in 8 bits.
QUANTISERS = {
    "int8": Quantiser("torchao", 8.0),
    "fp8": Quantiser("torchao", 8.0),
    "int4": Quantiser("torchao", 4.25),
    "nf4": Quantiser("bitsandbytes", 4.13),
}


def base_of(name: str) -> str:
    """A base by its name. Raises ModelError for an unknown one."""
    if name not in get_args(Base):
        raise ModelError(f"base: {name!r} is not one of {', '.join(get_args(Base))}")
    return name


def share_of_bytes(base: str, dtype: torch.dtype) -> float:
    """Of a linear layer of the average in memory, against the dtype it is stored in."""
    return QUANTISERS[base].bits / (8 * dtype.itemsize) if base in QUANTISERS else 1.0


def check_base(base: str, device: torch.device) -> None:
    """Raises ModelError for an unknown base, or one that this device does not run; MissingExtraError without its
    library."""
    if base_of(base) == "16bit":
        return
    for library in (QUANTISERS[base].library, "accelerate"):
        if find_spec(library) is None:
            raise MissingExtraError(f"base {base} needs {library}; {install_line(EXTRA)}")
    if base == "int4" and device.type != "cuda":
        raise ModelError(f"base int4 has no kernel for {device.type}; nf4 has 4 bits there, int8 is nearer")


def holds(stored: str) -> tuple[str, ...]:
    """How a base that is stored in fewer bits can be held: 8 bits as they are, and any as what they stand for."""
    return ("int8", "16bit") if stored == "int8" else ("16bit",)


def held_digest(digest: str, base: str) -> str:
    """What answers depend on: a bundle's digest, and how its average is held."""
    return digest if base == "16bit" else f"{base}-{digest}"


def quantization_config(base: str, dtype: torch.dtype) -> Any:
    """transformers' own, for a base that `check_base` accepts."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if base == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
    from torchao import quantization as ao

    if base == "int4":
        if dtype is not torch.bfloat16:
            raise ModelError(f"base int4 computes in bfloat16, not in {dtype_name(dtype)}; load it with that dtype")
        return TorchAoConfig(ao.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return TorchAoConfig(ao.Int8WeightOnlyConfig() if base == "int8" else ao.Float8WeightOnlyConfig())


def hold_packed(model: nn.Module, numbers: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Puts whole numbers, int8 [out, in] with scales [out, 1], in the place of linear layers' weights: torchao's tensor
    of a weight in 8 bits, with these very numbers."""
    from torchao.quantization import Int8Tensor

    for name, (weight, scale) in numbers.items():
        held = Int8Tensor(weight, scale.float(), [1, weight.shape[1]], dtype)
        module = model.get_submodule(name)
        module.weight = nn.Parameter(held.to(next(module.parameters()).device), requires_grad=False)


def is_quantised(parameter: Any) -> bool:
    """Whether a library holds a parameter in its own way: nobody but its layer may read it as numbers."""
    return parameter is not None and type(parameter) not in (nn.Parameter, Tensor)
