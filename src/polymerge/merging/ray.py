"""A merge's tasks on the machines of a Ray cluster.

Every task is one tensor, as in `polymerge.merging.executor`. A machine hands back what it made, and this process alone
writes, so a task that is done twice, because its machine was lost or only seemed to be, does no harm.

Needs the extra `ray`, and on every machine the same polymerge and the sources under the same paths.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingExtraError, PolymergeError, SourceError, install_line
from ..method.weights import Weights
from ..recipe.merge import Recipe
from ..recipe.source import Source
from ..sources.aligned import AlignedCheckpoint, Moves
from ..sources.checkpoint import Checkpoint
from ..sources.fused import by_matrices
from ..sources.opening import open_checkpoint
from ..version import __version__
from .executor import Executor, Made, Work, in_turn, make, settings_of
from .plan import MergePlan
from .treatment import TensorTask

# A task whose machine is lost is done again so many times; a merge that kills its machines must end some day.
RETRIES = 5
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class WorkOrder:
    """What a worker needs to know once.

    Attributes:
        recipe: with absolute paths.
        threads: of torch; the bytes of a product depend on it.
        sources: expert -> fingerprint of its weights here.
        moves: expert -> how its tensors are permuted, where experts are aligned.
    """

    recipe: Recipe
    dtype: torch.dtype
    threads: int
    version: str
    sources: Mapping[str, tuple[str, ...]]
    moves: Mapping[str, Moves]


@contextmanager
def ray_cluster(address: str | None = None) -> Iterator[Executor]:
    """An executor on a cluster: of the given address, of RAY_ADDRESS, or of this machine alone.

    Raises:
        MissingExtraError: Ray is not installed. PolymergeError: the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError(f"--executor ray needs Ray; {install_line('ray')}") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own coming default; it warns otherwise
    if address and address != "auto":
        _check_reachable(address)
    try:
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PolymergeError(f"Ray cluster {address or 'of this machine'}: cannot be reached ({reason})") from None
    try:
        yield _on_ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for ten minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "expected host:port"
        raise PolymergeError(f"Ray cluster {address}: cannot be reached ({reason})") from None


def _on_ray(plan: MergePlan, todo: Sequence[int]) -> Iterator[tuple[int, Work]]:
    """An `Executor`."""
    import ray

    order = ray.put(_work_order(plan))
    cpus, gpus, slots = _shares(plan)
    remote = ray.remote(_work).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
    running: set[Any] = set()

    def start(index: int) -> Callable[[], Made]:
        reference = remote.remote(order, plan.tasks[index], plan.weights(plan.tasks[index]))
        running.add(reference)

        def wait() -> Made:
            running.remove(reference)
            return _result(reference, plan.tasks[index].name)

        return wait

    try:
        yield from in_turn(plan, todo, start, ahead=2 * slots)
    finally:
        for reference in running:
            ray.cancel(reference)


def _shares(plan: MergePlan) -> tuple[float, float, int]:
    """CPUs and GPUs of a task, and how many tasks fit the cluster at once.

    A task uses as many CPUs as a product does here, or all that the smallest machine has.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = min([torch.get_num_threads(), *(node["CPU"] for node in nodes if node.get("CPU"))])
    total = ray.cluster_resources()
    with_gpu = plan.recipe.device in ("auto", "cuda") and total.get("GPU", 0) >= 1
    slots = total["GPU"] if with_gpu else total.get("CPU", 1) // cpus
    return cpus, float(with_gpu), max(1, int(slots))


def _result(reference: Any, tensor: str) -> Made:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        made: Made = ray.get(reference)
        return made
    except RayTaskError as error:
        if isinstance(error.cause, PolymergeError):
            raise error.cause from None
        raise PolymergeError(f"tensor {tensor!r}: {type(error.cause).__name__} on a worker: {error.cause}") from None
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise PolymergeError(
            f"tensor {tensor!r}: no machine of the cluster could do it ({reason}); run again with --resume"
        ) from None


def _work_order(plan: MergePlan) -> WorkOrder:
    experts = {name: _absolute(source) for name, source in plan.recipe.experts.items()}
    return WorkOrder(
        recipe=plan.recipe.model_copy(update={"experts": experts}),
        dtype=plan.dtype,
        threads=torch.get_num_threads(),
        version=__version__,
        sources={name: tuple(checkpoint.fingerprint()) for name, checkpoint in plan.checkpoints.items()},
        moves={name: c.moves for name, c in plan.checkpoints.items() if isinstance(c, AlignedCheckpoint)},
    )


def _absolute(source: Source) -> Source:
    """A worker has another working folder."""

    def resolved(text: str | None) -> str | None:
        path = Path(text).expanduser() if text else None
        return str(path.resolve()) if path and path.exists() else text

    return source.model_copy(update={"source": resolved(source.source), "base": resolved(source.base)})


def _work(order: WorkOrder, task: TensorTask, weights: Mapping[str, Weights]) -> Made:
    """On a worker: one tensor."""
    torch.set_num_threads(order.threads)
    settings = settings_of(order.recipe, order.dtype, order.recipe.device)
    return make(task, _opened(order, task), settings, weights)


def _opened(order: WorkOrder, task: TensorTask) -> dict[str, Checkpoint]:
    """The sources as this machine sees them, opened once in a process."""
    if order.version != __version__:
        raise PolymergeError(f"a worker has polymerge {__version__}, this machine {order.version}; install one version")
    sources = tuple(order.recipe.experts.items()), tuple(order.sources.items())
    opened = _open_all(*sources)
    if any(source not in opened[expert].tensors for expert, source in task.sources.items()):
        opened = _by_matrices(*sources, order.recipe.trust_remote_code)
    return {n: AlignedCheckpoint(c, order.moves[n]) if n in order.moves else c for n, c in opened.items()}


@lru_cache(maxsize=2)
def _by_matrices(experts: Any, sources: Any, trust_remote_code: bool) -> dict[str, Checkpoint]:
    opened = _open_all(experts, sources)
    return {name: by_matrices(c, trust_remote_code=trust_remote_code)[0] for name, c in opened.items()}


@lru_cache(maxsize=2)
def _open_all(experts: Any, sources: Any) -> dict[str, Checkpoint]:
    import ray

    opened = {name: open_checkpoint(source) for name, source in experts}
    for name, files in sources:
        if tuple(opened[name].fingerprint()) != files:
            node = ray.util.get_node_ip_address()
            raise SourceError(f"{opened[name].label}: the files of expert {name!r} differ on the machine {node}")
    return opened
