"""The published code: the factors themselves, in the bundle's dtype, as PEFT reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .code import Code, check_tensor
from .rsvd import rank_for_rate


@dataclass(frozen=True)
class Factors(Code):
    """A [r, in] and B [out, r] as they are.

    Args:
        dtype: of what is encoded. Factors of an adapter have its own dtype, so that any is decoded.
    """

    dtype: torch.dtype

    name = "factors"
    suffixes = ("lora_A.weight", "lora_B.weight")
    peft_readable = True
    file_name = "adapter_model.safetensors"
    format_version = 1
    kernel_bits = 0

    def rank(self, out_features: int, in_features: int, compress_rate: float) -> int:
        return rank_for_rate(out_features, in_features, compress_rate)

    def bytes(self, out_features: int, in_features: int, rank: int) -> int:
        return rank * (out_features + in_features) * self.dtype.itemsize

    def encode(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:
        return {"lora_A.weight": a.to(self.dtype), "lora_B.weight": b.to(self.dtype)}

    def check(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        a, b = stored["lora_A.weight"], stored["lora_B.weight"]
        rank = a.shape[:1].numel()
        check_tensor("lora_A.weight", a, a.dtype if a.is_floating_point() else self.dtype, (rank, in_features))
        check_tensor("lora_B.weight", b, a.dtype, (out_features, rank))

    def decode(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        self.check(stored, out_features, in_features)
        return stored["lora_B.weight"].float(), stored["lora_A.weight"].float()
