"""BitDelta (Liu et al. 2024, arXiv 2402.10193): one bit a number for its difference's sign, one scale a matrix.

From the paper, not from its code. The scales are those it starts from, the nearest ones in the Frobenius norm (its
equation 2); its distillation of the scales on texts is left out. Embeddings are averaged, norms each expert's own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from peer_methods.served import InTurn, Served, load_shared, put
from peer_methods.task import Task, save_shared, save_tensors

PLACES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def encode(delta: Tensor) -> tuple[Tensor, Tensor]:
    """delta [out, in] -> its signs, eight a byte [out, ceil(in / 8)] uint8, and the scale [] float32."""
    bits = torch.nn.functional.pad((delta >= 0).to(torch.uint8), (0, -delta.shape[1] % 8))
    return (bits.view(len(delta), -1, 8) * PLACES).sum(-1, dtype=torch.uint8), delta.abs().mean()


def decode(signs: Tensor, scale: Tensor, width: int) -> Tensor:
    """The difference that was kept, [out, width] float32."""
    bits = (signs[..., None] & PLACES) != 0
    return torch.where(bits.flatten(1)[:, :width], scale, -scale)


def merge(task_file: str, output: str) -> None:
    task, folder = Task.load(task_file), Path(output)
    for expert, checkpoint in task.checkpoints.items():
        tensors = {}
        for name in task.linear():
            delta = checkpoint.read(name).float() - task.pretrained.read(name).float()
            tensors[f"{name}.signs"], tensors[f"{name}.scale"] = encode(delta)
        tensors |= {name: checkpoint.read(name).float() for name in task.rest("norm", "bias")}
        save_tensors(tensors, folder / "experts" / f"{expert}.safetensors")
    save_shared(task, folder, task.rest("embedding", "lm_head"))


def serve(task: Task, folder: Path) -> Served:
    """Without its kernel for GPUs every expert is unpacked, and batches run one after the other."""
    models = {}
    for expert in task.experts:
        model, tokenizer = load_shared(task.base, folder)
        stored = load_file(folder / "experts" / f"{expert}.safetensors")
        for name, (_, width) in task.linear().items():
            delta = decode(stored.pop(f"{name}.signs"), stored.pop(f"{name}.scale"), width)
            stored[name] = task.pretrained.read(name).float() + delta
        put(model, stored)
        models[expert] = model
    return InTurn(models, tokenizer)
