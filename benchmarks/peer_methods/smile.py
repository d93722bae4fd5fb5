"""SMILE (Tang et al. 2024, arXiv 2408.10174): low-rank experts in every linear layer, and a gate without training.

From the paper, not from FusionBench's code. Expert i's difference from the pre-trained weight is U_i S_i V_i^T, cut to
rank r. A token goes to the expert into whose first k_gate input directions it reaches farthest: the largest
||V_{i,k}^T x||, top-1, whose weight renormalises to 1. Everything but the linear layers is averaged.

The gate needs V, which the factors S V^T hold already; it is read off them here and costs no bytes (FusionBench stores
it a second time).
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from peer_methods.lowrank import Gate, extract, install
from peer_methods.served import OneModel, Served, load_shared
from peer_methods.task import Task, save_shared

# FusionBench's setting for language models (config/method/smile_upscaling), where the rank allows it.
ROUTER_RANK = 8


def merge(task_file: str, output: str) -> None:
    task, folder = Task.load(task_file), Path(output)
    extract(task, folder, lambda name: task.pretrained.read(name).float(), task.ranks())
    save_shared(task, folder, task.rest())


def serve(task: Task, folder: Path) -> Served:
    model, tokenizer = load_shared(task.base, folder)
    install(model, task, folder, norm_gate)
    return OneModel(model, tokenizer)


def norm_gate(a: Tensor, router_rank: int = ROUTER_RANK) -> Gate:
    """The gate of a layer whose experts have the factors a = S V^T, [experts, r, in]."""
    singular = a[:, :router_rank].norm(dim=-1).clamp_min(1e-12)  # [experts, k]

    def gate(z: Tensor) -> Tensor:
        reach = (z[..., : singular.shape[1]] / singular).norm(dim=-1)  # ||V_k^T x||, [B, T, experts]
        return F.one_hot(reach.argmax(dim=-1), reach.shape[-1]).to(z.dtype)

    return gate
