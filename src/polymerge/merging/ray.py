"""A merge's tasks on the machines of a Ray cluster.

Every task is one tensor, as in `polymerge.merging.executor`. A machine that sees the merge's staging folder (a shared
file system) writes its pieces there itself; one that does not hands their bytes back, and this process writes them.
Only this process notes a tensor as whole, so a task that is done twice, because its machine was lost or only seemed to
be, does no harm.

Needs the extra `ray`, and on every machine the same polymerge and the sources under the same paths.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingExtraError, PolymergeError, SourceError
from ..recipe.merge import Recipe, Source
from ..sources.aligned import AlignedCheckpoint, Moves
from ..sources.checkpoint import Checkpoint
from ..sources.opening import open_checkpoint
from ..version import __version__
from .compress import Settings
from .executor import Executor, compress_task, settings_of
from .journal import Note, PieceWriter, Staging
from .plan import MergePlan
from .treatment import TensorTask

# A task whose machine is lost is done again so many times; a merge that kills its machines must end some day.
RETRIES = 5
CONNECT_SECONDS = 10.0
# Bytes of pieces by file; empty where they lie in the staging folder already.
Contents = dict[str, bytes]


@dataclass(frozen=True)
class WorkOrder:
    """What a worker needs to know once.

    Attributes:
        recipe: with absolute paths.
        threads: of torch; the bytes of a product depend on it.
        staging: the folder of half-done work, where a worker can see it.
        token: a file in it that tells this folder from one of the same name on another machine.
        sources: expert -> fingerprint of its weights here.
        moves: expert -> how its tensors are permuted, where experts are aligned.
    """

    recipe: Recipe
    dtype: torch.dtype
    threads: int
    staging: Path
    token: str
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
        raise MissingExtraError("--executor ray needs Ray: pip install 'polymerge[ray]'") from None
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


def _on_ray(plan: MergePlan, staging: Staging, todo: Sequence[int]) -> Iterator[tuple[int, Note]]:
    """An `Executor`."""
    import ray

    token = f"token-{secrets.token_hex(8)}"
    (staging.folder / token).touch()
    order = ray.put(_work_order(plan, staging, token))
    cpus, gpus, slots = _shares(plan)
    remote = ray.remote(_work).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
    left = list(reversed(todo))
    running: dict[Any, int] = {}
    try:
        while left or running:
            while left and len(running) < 2 * slots:  # no more: results wait in memory
                index = left.pop()
                running[remote.remote(order, plan.tasks[index], index)] = index
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            note, contents = _result(done, plan.tasks[index].name)
            yield index, staging.take(index, note, contents)
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


def _result(reference: Any, tensor: str) -> tuple[Note, Contents]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        found: tuple[Note, Contents] = ray.get(reference)
        return found
    except RayTaskError as error:
        if isinstance(error.cause, PolymergeError):
            raise error.cause from None
        raise PolymergeError(f"tensor {tensor!r}: {type(error.cause).__name__} on a worker: {error.cause}") from None
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise PolymergeError(
            f"tensor {tensor!r}: no machine of the cluster could do it ({reason}); run again with --resume"
        ) from None


def _work_order(plan: MergePlan, staging: Staging, token: str) -> WorkOrder:
    experts = {name: _absolute(source) for name, source in plan.recipe.experts.items()}
    return WorkOrder(
        recipe=plan.recipe.model_copy(update={"experts": experts}),
        dtype=plan.dtype,
        threads=torch.get_num_threads(),
        staging=staging.folder.resolve(),
        token=token,
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


def _work(order: WorkOrder, task: TensorTask, index: int) -> tuple[Note, Contents]:
    """On a worker: one tensor."""
    torch.set_num_threads(order.threads)
    checkpoints, settings = _opened(order), settings_of(order.recipe, order.dtype, order.recipe.device)
    name = f"{index:06d}-{secrets.token_hex(4)}"  # of this attempt alone: a machine that was given up may still write
    if (order.staging / order.token).exists():
        return _compressed(task, checkpoints, settings, order.staging, name), {}
    with tempfile.TemporaryDirectory(prefix="polymerge-") as scratch:
        note = _compressed(task, checkpoints, settings, Path(scratch), name)
        return note, {piece.file: (Path(scratch) / piece.file).read_bytes() for piece in note.pieces}


def _compressed(
    task: TensorTask, checkpoints: Mapping[str, Checkpoint], settings: Settings, root: Path, name: str
) -> Note:
    folder = root / "parts" / name
    folder.mkdir(parents=True)
    return compress_task(task, checkpoints, settings, PieceWriter(root, folder))


def _opened(order: WorkOrder) -> dict[str, Checkpoint]:
    """The sources as this machine sees them, opened once in a process."""
    if order.version != __version__:
        raise PolymergeError(f"a worker has polymerge {__version__}, this machine {order.version}; install one version")
    opened = _open_all(tuple(order.recipe.experts.items()), tuple(order.sources.items()))
    return {n: AlignedCheckpoint(c, order.moves[n]) if n in order.moves else c for n, c in opened.items()}


@lru_cache(maxsize=2)
def _open_all(experts: Any, sources: Any) -> dict[str, Checkpoint]:
    import ray

    opened = {name: open_checkpoint(source) for name, source in experts}
    for name, files in sources:
        if tuple(opened[name].fingerprint()) != files:
            node = ray.util.get_node_ip_address()
            raise SourceError(f"{opened[name].label}: the files of expert {name!r} differ on the machine {node}")
    return opened
