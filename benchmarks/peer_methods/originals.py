"""The experts themselves, dense, one after the other: what every method is measured against and what it saves."""

from __future__ import annotations

from pathlib import Path

from peer_methods.served import InTurn, Served, load_shared, put
from peer_methods.task import Cost, Task


def merge(task: Task, folder: Path) -> Cost:
    return Cost(0.0, 0)


def serve(task: Task, folder: Path) -> Served:
    loaded = {name: load_shared(path) for name, path in task.experts.items()}
    return InTurn({name: model for name, (model, _) in loaded.items()}, next(iter(loaded.values()))[1])


def serve_averaged(task: Task, folder: Path) -> Served:
    """Embeddings averaged, all else their own: the best that a method with one embedding for all can reach."""
    served = serve(task, folder)
    assert isinstance(served, InTurn)
    averages = {name: task.average(name) for name in task.rest("embedding", "lm_head")}
    for model in served.models.values():
        put(model, averages)
    return served
