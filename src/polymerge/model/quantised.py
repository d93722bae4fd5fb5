"""A base in fewer bits than the bundle stores: which library quantises it, through transformers' own configuration, and
how far it moves the answers.

The residuals stay as they are and are added to what the library's layers give; fitting them anew around a rounded base
spends their rank on noise (docs/log.md). Knows names, libraries and logits; does not know layers' places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import MissingExtraError, ModelError
from ..host import dtype_name

if TYPE_CHECKING:
    from .mixed import MixedModel

Base = Literal["16bit", "int8", "nf4", "int4", "fp8"]
EXTRA = "quantized"
# What the distance of two bases is measured on; read by the average and by every expert.
TEXT = (
    "Question: A train leaves the station at 9:40 and arrives at 11:05. How many minutes does it take?\n"
    "Answer: From 9:40 to 10:40 are 60 minutes, and 25 more until 11:05, so it takes 85 minutes."
)


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


def check_base(base: str, device: torch.device) -> None:
    """Raises ModelError for an unknown base, or one that this device does not run; MissingExtraError without its
    library."""
    if base not in get_args(Base):
        raise ModelError(f"base: {base!r} is not one of {', '.join(get_args(Base))}")
    if base == "16bit":
        return
    for library in (QUANTISERS[base].library, "accelerate"):
        if find_spec(library) is None:
            raise MissingExtraError(f"base {base} needs {library}; run `pip install polymerge[{EXTRA}]`")
    if base == "int4" and device.type != "cuda":
        raise ModelError(f"base int4 has no kernel for {device.type}; nf4 has 4 bits there, int8 is nearer")


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


def is_quantised(parameter: Any) -> bool:
    """Whether a library holds a parameter in its own way: nobody but its layer may read it as numbers."""
    return parameter is not None and type(parameter) not in (nn.Parameter, Tensor)


@torch.no_grad()
def log_probabilities(model: MixedModel, text: str = TEXT) -> list[Tensor]:
    """[T, V] float32 on the CPU, of the average and of every expert after each token of a text."""
    names = [None, *model.experts]
    known = min(model.vocabularies.of(name) for name in names)
    ids = [token for token in model.tokenizer_of(None).encode(text) if token < known]
    row = torch.tensor([ids], device=model.device)
    return [torch.log_softmax(model(row, experts=name).logits[0].float(), -1).cpu() for name in names]


def divergence(exact: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """KL(exact || other) in nats, the mean over all tokens. What neither can say (-inf) counts nothing."""
    each = [
        torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).mean() for p, q in zip(exact, other, strict=True)
    ]
    return float(torch.stack(each).mean())
