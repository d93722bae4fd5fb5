"""What vLLM can express of a bundle, and what not: decided from headers and small tensors, before anything is written.

vLLM adds B (A x) to a linear layer's output, and in some architectures to an embedding's and the head's. An expert's
norm can stand in the columns of the linear layers that read it (`polymerge.export.expressed`). Biases and what else is
its own stay out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...bundle.bundle import Bundle
from ...engine.vllm.folder import EMBEDDING_ARCHITECTURES, LORA_RANKS, padded_rank
from ...errors import ModelError
from ...host import DTYPES
from ..expressed import Expressed, Factored, Runtime, check_layers, check_persona, folded_counts, needed_rank

# For a bundle without low-rank residuals (compress rate 0 or 1).
DEFAULT_RANK = 64


@dataclass(frozen=True)
class VllmPlan:
    """What an export will write and what it cannot express.

    Attributes:
        max_lora_rank: of vLLM's launch; no factors are larger.
        experts: name -> factors to make, in the order of the file.
        norms: module of a norm that is folded -> its tensor.
        lost: one line for everything that stays out.
    """

    bundle: Bundle
    max_lora_rank: int
    experts: dict[str, list[Factored]]
    norms: dict[str, str]
    lost: tuple[str, ...]

    @property
    def dtype_name(self) -> str:
        """What vLLM computes in: the bundle's; over a base stored in fewer bits its kernels take 16 bits alone."""
        wide = self.bundle.manifest.dtype
        return "bfloat16" if wide == "float32" and self.bundle.manifest.base_code else wide

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @cached_property
    def folded(self) -> dict[str, int]:
        """What goes into the factors although vLLM has no place for it: kind -> how often, over all experts."""
        return folded_counts(self.bundle, self.experts)

    @property
    def adapter_bytes(self) -> int:
        """Of all adapters' files."""
        return sum(task.numel for tasks in self.experts.values() for task in tasks) * self.dtype.itemsize

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Last names of the modules that any expert changes."""
        return tuple(sorted({t.module.rpartition(".")[2] for tasks in self.experts.values() for t in tasks}))

    @property
    def slot_bytes(self) -> int:
        """What vLLM reserves for one loaded adapter: factors for all modules of these names, at `max_lora_rank`."""
        linear = [layer for layer in self.bundle.layers.values() if layer.role == "linear"]
        shapes = {layer.module: layer.shape for layer in linear}
        shapes |= {task.module: task.shape for tasks in self.experts.values() for task in tasks}
        widths = [sum(s) for module, s in shapes.items() if module.rpartition(".")[2] in self.target_modules]
        return sum(widths) * self.max_lora_rank * self.dtype.itemsize


def plan_vllm(bundle: Bundle | str | Path, *, max_rank: int | None = None) -> VllmPlan:
    """Says what an export can express, from headers and a few small tensors.

    Args:
        max_rank: vLLM's `--max-lora-rank`; by default the smallest that holds the bundle's own factors.

    Raises:
        ModelError: a rank that vLLM does not know, residuals of fused mixture-of-experts blocks, or an expert with
            a tokenizer, end tokens, positions or a vocabulary of its own.
    """
    bundle = Bundle.open(bundle)
    takes_embeddings = bundle.manifest.architecture in EMBEDDING_ARCHITECTURES
    runtime = Runtime("vLLM", takes_embeddings=takes_embeddings)
    for expert in bundle.experts:
        check_persona(bundle, expert, runtime)
    if max_rank is not None and max_rank not in LORA_RANKS:
        raise ModelError(f"rank {max_rank}: vLLM takes one of {', '.join(map(str, LORA_RANKS))}")
    linear = check_layers(bundle, runtime)
    largest = max((needed_rank(bundle, layer) for layer in linear), default=0)
    allowed = max_rank or padded_rank(largest or DEFAULT_RANK)
    if takes_embeddings:
        largest = max((layer.rank for layer in bundle.layers.values()), default=0)
    expressed = Expressed(bundle, runtime, allowed)
    experts = {expert: expressed.tasks(expert) for expert in bundle.experts}
    lost = list(expressed.lost)
    if largest > allowed:
        lost.append(f"all experts: residuals of rank up to {largest} are cut to rank {allowed}")
    norms = {layer.module: layer.tensor for layer in bundle.layers.values() if layer.role == "norm"}
    return VllmPlan(bundle, allowed, experts, norms, tuple(lost))
