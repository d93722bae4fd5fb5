"""What llama.cpp can express of a bundle, and who writes it: decided before anything is written.

llama.cpp adds B (A x) to any linear layer's output, the head's and the embedding's. It has no place for norms and
biases in an adapter, and passes over norms that it finds there. A head that is the embedding takes no factors of its
own, so where experts change it, the base gets a head beside its embedding.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...bundle.bundle import Bundle
from ...engine.llamacpp.folder import Kind
from ...errors import ModelError
from ...host import DTYPES
from ...sources.persona import load_tokenizer
from ..expressed import HEAD, Expressed, Factored, Runtime, check_layers, check_persona, folded_counts, needed_rank
from .converter import LlamaCpp, quantizer
from .forward import left_out
from .names import WRITTEN, Architecture, architecture_of
from .tokens import splitting
from .types import ADAPTER_TYPES, WRITABLE, packed_bytes, stored_type

# Ranks are whole blocks of Q8_0, so that factors of every type fit.
RANK_STEP = 32
# A small tensor that differs less from the average's, as a share of its norm, is the same in bfloat16.
NEGLIGIBLE = 2.0**-8
RUNTIME = Runtime("llama.cpp", takes_embeddings=True, whole=True, negligible=NEGLIGIBLE)


@dataclass(frozen=True)
class GgufPlan:
    """What an export will write and what it cannot express.

    Attributes:
        architecture: llama.cpp's; None where only its own converters know it.
        experts: name -> factors to make, in the order of the file.
        norms: module of a norm that is folded -> its tensor.
        lost: one line for everything that stays out.
        negligible: one line for what stays out and is the average's within the rounding of 16 bits.
        quantizer: what makes the base of another file, where it is needed.
    """

    bundle: Bundle
    type: Kind
    architecture: Architecture | None
    llama_cpp: LlamaCpp | None
    quantizer: Path | None
    experts: dict[str, list[Factored]]
    norms: dict[str, str]
    lost: tuple[str, ...]
    negligible: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.bundle.manifest.dtype]

    @property
    def adapter_type(self) -> Kind:
        return ADAPTER_TYPES[self.type]

    @property
    def untied(self) -> bool:
        """Experts change a head that is the embedding."""
        heads = any(task.module == HEAD for tasks in self.experts.values() for task in tasks)
        return heads and self.bundle.manifest.tied_embedding is not None

    @cached_property
    def folded(self) -> dict[str, int]:
        """What goes into the factors although llama.cpp has no place for it: kind -> how often, over all experts."""
        return folded_counts(self.bundle, self.experts)

    @property
    def bytes(self) -> int:
        """Of all files, and of what lies beside them while they are written."""
        kind: Kind = self.type if self.type in WRITABLE else "f16"
        base = sum(packed_bytes(x.shape, stored_type(kind, x.shape)) for x in self.bundle.layers.values())
        pairs = max((sum(task.numel for task in tasks) for tasks in self.experts.values()), default=0)
        adapters = sum(task.numel for tasks in self.experts.values() for task in tasks) * 2
        beside = self.bundle.sizes().base if self.llama_cpp else 0
        return base * (2 if self.quantizer else 1) + adapters + pairs * self.dtype.itemsize + beside


def plan_gguf(
    bundle: Bundle | str | Path, *, type: Kind = "q8_0", max_rank: int | None = None,
    llama_cpp: str | Path | None = None,
) -> GgufPlan:  # fmt: skip
    """Says what an export can express, from headers and a few small tensors.

    Args:
        type: of the base.
        max_rank: of factors that are the bundle's; by default no limit.
        llama_cpp: the folder of llama.cpp's sources, whose converters then write the base.

    Raises:
        ModelError: an architecture or tokenizer that only llama.cpp's converters know, a converter that is missing,
            residuals of fused blocks, or an expert with a tokenizer, end tokens, positions or a vocabulary of its own.
    """
    bundle = Bundle.open(bundle)
    for expert in bundle.experts:
        check_persona(bundle, expert, RUNTIME)
    linear = check_layers(bundle, RUNTIME)
    converters = LlamaCpp(Path(llama_cpp).expanduser()) if llama_cpp else None
    architecture = architecture_of(bundle.persona().config, bundle.manifest.architecture or "")
    if converters is None:
        _check_written(bundle, architecture)
    command = None if type in WRITABLE else quantizer(converters)
    largest = max((needed_rank(bundle, layer) for layer in linear), default=0)
    rank = min(max_rank or math.inf, RANK_STEP * max(1, math.ceil(largest / RANK_STEP)))
    expressed = Expressed(bundle, RUNTIME, int(rank))
    experts = {expert: expressed.tasks(expert) for expert in bundle.experts}
    lost = [*(left_out(bundle.path) if converters else ()), *expressed.lost]
    if largest > rank:
        lost.append(f"all experts: residuals of rank up to {largest} are cut to rank {rank}")
    norms = {layer.module: layer.tensor for layer in bundle.layers.values() if layer.role == "norm"}
    return GgufPlan(
        bundle, type, architecture, converters, command, experts, norms, tuple(lost), tuple(expressed.negligible)
    )


def _check_written(bundle: Bundle, architecture: Architecture | None) -> None:
    """Raises ModelError unless the base can be written without llama.cpp's converters."""
    fix = "give --llama-cpp FOLDER with llama.cpp's converters"
    if architecture is None:
        known = ", ".join(WRITTEN)
        raise ModelError(
            f"{bundle.path}: {bundle.manifest.architecture} is not written here ({known} are, with plain positions and "
            f"no sliding window); {fix}"
        )
    for layer in bundle.layers.values():
        architecture.tensor(layer.tensor)
    tokenizer = load_tokenizer(bundle.persona())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or splitting(json.loads(backend.to_str())) is None:
        raise ModelError(f"{bundle.path}: its tokenizer is not byte-level BPE as llama.cpp splits it; {fix}")
