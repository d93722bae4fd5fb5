"""Low-rank experts beside a dense layer, as several peers have them: exact truncated SVDs, and a layer whose gate says
how much of every expert a token gets.

Knows nothing of how a gate decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from peer_methods.task import STORED, Task, save_tensors

# gate(z [B, T, experts, rank]) -> weights that broadcast to [B, T, experts]
Gate = Callable[[Tensor], Tensor]


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a rank: U [out, r] with orthonormal columns and S V^T [r, in]."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank, None] * vh[:rank]


def extract(
    task: Task,
    folder: Path,
    shared: Callable[[str], Tensor],
    ranks: Mapping[str, int],
    whole: Sequence[str] = (),
) -> None:
    """Writes every expert's differences from `shared` as factors, and those of the tensors `whole` as they are."""
    for expert, checkpoint in task.checkpoints.items():
        tensors: dict[str, Tensor] = {}
        for name, rank in ranks.items():
            b, a = truncated_svd(checkpoint.read(name).float() - shared(name), rank)
            tensors |= {f"{name}.A": a.to(STORED), f"{name}.B": b.to(STORED)}
        tensors |= {name: checkpoint.read(name).float() - shared(name) for name in whole}
        save_tensors(tensors, folder / "experts" / f"{expert}.safetensors")


class GatedLinear(nn.Module):
    """y = W x + sum over experts of g_i B_i A_i x.

    Args:
        inner: the dense layer.
        a: for every expert [r, in]. b: for every expert [out, r]. One rank for all.
    """

    a: Tensor
    b: Tensor

    def __init__(self, inner: nn.Module, a: Sequence[Tensor], b: Sequence[Tensor], gate: Gate) -> None:
        super().__init__()
        self.inner, self.gate, self.experts = inner, gate, len(a)
        self.register_buffer("a", torch.cat([part.float() for part in a]))
        self.register_buffer("b", torch.cat([part.float() for part in b], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out]"""
        z = F.linear(x, self.a)
        z = z.view(*z.shape[:-1], self.experts, -1)  # [B, T, experts, r]
        kept = (z * self.gate(z)[..., None]).flatten(-2)
        output: Tensor = self.inner(x) + F.linear(kept, self.b)
        return output


def install(model: Any, task: Task, folder: Path, gate: Callable[[Tensor], Gate]) -> dict[str, Tensor]:
    """Puts the experts' factors into a model.

    Args:
        gate: from a layer's A of all experts [experts, r, in] to the layer's gate.

    Returns:
        What was stored whole, [experts, ...] by name.
    """
    stored = [load_file(folder / "experts" / f"{expert}.safetensors") for expert in task.experts]
    for name in task.linear():
        a, b = ([tensors.pop(f"{name}.{factor}") for tensors in stored] for factor in "AB")
        module = name.removesuffix(".weight")
        parent, _, leaf = module.rpartition(".")
        layer = GatedLinear(model.get_submodule(module), a, b, gate(torch.stack(a).float()))
        setattr(model.get_submodule(parent), leaf, layer)
    return {name: torch.stack([tensors[name] for tensors in stored]) for name in stored[0]}
