"""Every row of the table: a name, how it is merged and served, and what it stores beside the one model.

Settings are the published ones; docs/benchmarks.md names the source of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peer_methods import adapters, bitdelta, mergekit, originals, ours, smile, twin
from peer_methods.served import Served
from peer_methods.task import Cost, Task, run_apart, stored_bytes

# Who says which expert answers: nobody (one model for all), the request's sender, or the method.
Chosen = Literal["one model", "named", "itself"]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        merge: writes what it stores into an empty folder. A file named `shared.safetensors` or a folder `model` belongs
            to the one model; the rest lies beside it.
        stored: bytes beside the one model, from that folder.
        mergekit: whether the merge needs it.
    """

    name: str
    chosen: Chosen
    merge: Callable[[Task, Path], Cost]
    serve: Callable[[Task, Path], Served]
    stored: Callable[[Task, Path], int]
    mergekit: bool = False

    @property
    def folder(self) -> str:
        """The name as a folder's."""
        return "".join(character if character.isalnum() else "-" for character in self.name)


def nothing(task: Task, folder: Path) -> int:
    return 0


def experts_folder(task: Task, folder: Path) -> int:
    return stored_bytes(folder / "experts")


def other_models(task: Task, folder: Path) -> int:
    """All experts but one, at two bytes a number."""
    return (len(task.experts) - 1) * one_model(task)


def other_models_but_embeddings(task: Task, folder: Path) -> int:
    shared = sum(task.pretrained.tensors[name].numel for name in task.rest("embedding", "lm_head"))
    return (len(task.experts) - 1) * (one_model(task) - 2 * shared)


def one_model(task: Task) -> int:
    """Bytes of one dense model at two bytes a number."""
    return 2 * sum(info.numel for info in task.pretrained.tensors.values())


def dense(name: str, method: str, each: dict[str, float], **shared: Any) -> Method:
    merge = partial(_merge_dense, method=method, each=each, shared=shared)
    return Method(name, "one model", merge, mergekit.serve_dense, nothing, mergekit=True)


def _merge_dense(task: Task, folder: Path, method: str, each: dict[str, float], shared: dict[str, Any]) -> Cost:
    return mergekit.merge_dense(task, folder, method, each, **shared)


def apart(call: str, **options: Any) -> Callable[[Task, Path], Cost]:
    """A merge in Python, run in a process of its own. The task lies in the folder's parent."""

    def merge(task: Task, folder: Path) -> Cost:
        return run_apart(call, str(folder.parent / "task.json"), str(folder), **options)

    return merge


def polymerge_rows(name: str, **recipe: Any) -> list[Method]:
    """A recipe, told the expert and with its router. A new code is one more call in METHODS."""
    return [
        Method(
            f"polymerge, {name}" + (", routed" if routed else ""),
            "itself" if routed else "named",
            apart("peer_methods.ours:make", routed=routed, **recipe),
            lambda task, folder, routed=routed: ours.Ours(folder, routed),  # type: ignore[misc]
            lambda task, folder: ours.beside_one_model(folder),
        )
        for routed in (False, True)
    ]


METHODS = [
    Method("the experts themselves", "named", originals.merge, originals.serve, other_models),
    Method(
        "their embeddings averaged", "named", originals.merge, originals.serve_averaged, other_models_but_embeddings
    ),
    dense("average (mergekit linear)", "linear", {"weight": 1.0}),
    dense("task arithmetic, 0.4", "task_arithmetic", {"weight": 0.4}),
    dense("task arithmetic, 1.0", "task_arithmetic", {"weight": 1.0}),
    dense("TIES, density 0.2", "ties", {"weight": 1.0, "density": 0.2}),
    dense("DARE linear, density 0.8", "dare_linear", {"weight": 1.0, "density": 0.8}),
    dense("DARE TIES, density 0.5", "dare_ties", {"weight": 0.4, "density": 0.5}),
    Method("mergekit-extract-lora", "named", adapters.merge, adapters.serve, experts_folder, True),
    Method(
        "mergekit-extract-lora, norms averaged",
        "named",
        adapters.merge_without_norms,
        adapters.serve_without_norms,
        experts_folder,
        mergekit=True,
    ),
    Method("Arrow, top 3", "itself", adapters.merge_without_norms, adapters.serve_arrow, experts_folder, True),
    Method("SMILE", "itself", apart("peer_methods.smile:merge"), smile.serve, experts_folder),
    Method("Twin-Merging, a tenth", "itself", apart("peer_methods.twin:merge"), twin.serve, experts_folder),
    Method("Twin-Merging, equal bytes", "itself", apart("peer_methods.twin:merge_equal"), twin.serve, experts_folder),
    Method("BitDelta", "named", apart("peer_methods.bitdelta:merge"), bitdelta.serve, experts_folder),
    *polymerge_rows("published", code="factors"),
    *polymerge_rows("int4", code="int4"),
    *polymerge_rows("int4, half the bytes", code="int4", compress_rate=0.975),
]
