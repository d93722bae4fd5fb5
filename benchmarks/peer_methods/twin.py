"""Twin-Merging (Lu et al. 2024, arXiv 2406.15479): a shared expert, and what it lacks of every expert, compressed.

From the paper and the settings of its repository, not from its code. The shared expert is task arithmetic over all
experts, at its scale of 0.3. Expert t's exclusive knowledge is v_t = theta_t - theta_shared; matrices are cut to a
rank, norms kept. A small network, trained on the shared expert's last hidden state of a request, weighs them: the
request is answered by theta_shared + sum of w_t v_t. Embeddings are averaged and have no v_t.

As published every v_t keeps a tenth of its singular values; `merge_equal` keeps the rank of polymerge's bytes. The
weights are applied as weights of low-rank factors, so that rows with different ones share a batch (the published code
rebuilds the model for every request).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from peer_methods.lowrank import extract, install
from peer_methods.served import Served, greedy, load_shared
from peer_methods.task import STORED, Task, save_tensors

SCALE = 0.3
KEPT = 0.1
EPOCHS, BATCH, RATE, DROPOUT = 50, 256, 5e-4, 0.5


def merge(task_file: str, output: str) -> None:
    """A tenth of the singular values, as published."""
    task = Task.load(task_file)
    _merge(task, Path(output), {name: int(KEPT * min(shape)) for name, shape in task.linear().items()})


def merge_equal(task_file: str, output: str) -> None:
    """At polymerge's rank."""
    task = Task.load(task_file)
    _merge(task, Path(output), task.ranks())


def _merge(task: Task, folder: Path, ranks: dict[str, int]) -> None:
    shared = _shared(task)
    extract(task, folder, shared, ranks, whole=task.rest("norm"))
    names = task.records
    save_tensors({name: shared(name) for name in names}, folder / "shared.safetensors")
    model, tokenizer = load_shared(task.base, folder)
    states = torch.cat([features(model, tokenizer, texts) for texts in task.texts.values()])
    labels = torch.tensor([number for number, texts in enumerate(task.texts.values()) for _ in texts])
    router = train_router(states, labels, len(task.experts))
    weights = {name: value.to(STORED) for name, value in router.state_dict().items() if value.is_floating_point()}
    save_tensors(weights, folder / "experts" / "router.safetensors")


def _shared(task: Task) -> Callable[[str], Tensor]:
    """Task arithmetic; the embeddings' average."""

    def tensor(name: str) -> Tensor:
        if task.records[name].role in ("embedding", "lm_head"):
            return task.average(name)
        base = task.pretrained.read(name).float()
        return base + SCALE * len(task.experts) * (task.average(name) - base)

    return tensor


class Router(nn.Module):
    """hidden state -> logits of the experts, with the published network's form."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width)
        self.second, self.last = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, experts)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, experts]"""
        x = F.leaky_relu(self.norm(self.first(x)))
        scores: Tensor = self.last(self.second(F.dropout(x, DROPOUT, self.training)))
        return scores


def train_router(states: Tensor, labels: Tensor, experts: int) -> Router:
    """states [n, width], labels [n] -> the trained network."""
    torch.manual_seed(0)
    router = Router(states.shape[1], experts).train()
    optimizer = torch.optim.AdamW(router.parameters(), lr=RATE, weight_decay=0.0)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(states)), BATCH):
            loss = F.cross_entropy(router(states[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return router.eval()


@torch.no_grad()
def features(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The last hidden state of every request, [n, width]."""
    states = []
    for start in range(0, len(texts), 64):
        rows = [f"{text}\n" for text in texts[start : start + 64]]
        inputs = tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=False)
        states.append(last_state(model, inputs["input_ids"], inputs["attention_mask"]))
    return torch.cat(states)


@torch.no_grad()
def last_state(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, T], padded on the left -> [B, width]"""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    state: Tensor = model.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state[:, -1]
    return state


class Twin(Served):
    """Weights [B, experts] are set for the time of a call; without them the shared expert alone answers."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.model, self.tokenizer = load_shared(task.base, folder)
        self.weights = torch.zeros(1, len(task.experts))
        whole = install(self.model, task, folder, lambda a: lambda z: self.weights[:, None, :])
        self.router = Router(self.model.config.hidden_size, len(task.experts))
        self.router.load_state_dict(load_file(folder / "experts" / "router.safetensors"), strict=False)
        self.router.eval().requires_grad_(False)
        parameters = dict(self.model.named_parameters())
        self.vectors = {name: (parameters[name].data.clone(), delta) for name, delta in whole.items()}

    def logits(self, ids: Tensor, prompt: int, expert: str) -> Tensor:
        self._route(ids[:, :prompt], torch.ones(1, prompt, dtype=torch.long))
        logits: Tensor = self.model(ids).logits
        return logits

    def generate(self, ids: Tensor, mask: Tensor, experts: Sequence[str], **options: Any) -> Tensor:
        self._route(ids, mask)
        return greedy(self.model, ids, mask, **options)

    def _route(self, ids: Tensor, mask: Tensor) -> None:
        self._set(torch.zeros(len(ids), self.weights.shape[1]))
        self._set(torch.softmax(self.router(last_state(self.model, ids, mask)), dim=-1))

    def _set(self, weights: Tensor) -> None:
        self.weights = weights
        for name, (shared, delta) in self.vectors.items():
            module, _, leaf = name.rpartition(".")
            row_own = (shared + weights @ delta)[:, None]  # [B, 1, width], which broadcasts in a norm
            setattr(self.model.get_submodule(module), leaf, nn.Parameter(row_own, requires_grad=False))


def serve(task: Task, folder: Path) -> Served:
    return Twin(task, folder)
