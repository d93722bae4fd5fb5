"""One candidate in a process of its own, so that its peak of memory is its own and its death takes nothing along.

`python -m polymerge.assess.worker` reads a CandidateJob as JSON from standard input and writes one JSON object a line
to standard output: a measurement, a failure, progress. Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.base import Engine
from ..errors import PolymergeError
from .measure import AskSettings, Measurement, measure_harness, measure_rows

# What a worker says: {"event": "measured" | "failed" | "progress" | "loaded", ...}
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class CandidateJob:
    """What a worker does.

    Attributes:
        source: keys of `polymerge.recipe.source.Source`, or {"bundle": folder, "base": as `load_model` takes it}.
        work: (expert or None, task, whether the task is a JSONL file), in order.
        cache: where answers are remembered; None does not.
    """

    source: dict[str, Any]
    work: list[tuple[str | None, str, bool]]
    ask: AskSettings
    device: str = "auto"
    dtype: str | None = None
    batch_tokens: int = 4096
    trust_remote_code: bool = False
    cache: str | None = None


def run_job(job: CandidateJob, engine: Engine, emit: Emit) -> None:
    """Every task of the job on an engine. A task that fails is said and the next one begins."""
    from ..engine.wrappers.cached import CachedEngine
    from ..engine.wrappers.metered import MeteredEngine

    meter = MeteredEngine(engine)

    def progress(done: int, total: int) -> None:
        emit({"event": "progress", "done": done, "total": total})

    salt = {"device": job.device, "dtype": str(job.dtype)}
    cached = CachedEngine(meter, Path(job.cache) if job.cache else None, salt=salt, progress=progress)
    for expert, task, is_rows in job.work:
        place = {"expert": expert, "task": task}
        emit({"event": "begins", **place})
        meter.reset()
        try:
            measured = (
                measure_rows(cached, Path(task), expert, job.ask)
                if is_rows
                else measure_harness(cached, task, expert, job.ask)
            )
        except (PolymergeError, MemoryError) as error:
            emit({"event": "failed", **place, "reason": str(error) or "out of memory"})
            continue
        measured = replace(measured, tokens_per_second=meter.tokens_per_second, **_memory(engine))
        emit({"event": "measured", **place, "measurement": measured.to_json()})


def load_engine(job: CandidateJob) -> Engine:
    """The job's model. Raises PolymergeError where it cannot be loaded."""
    import torch

    from ..engine.local.engine import HFEngine
    from ..recipe.source import Source

    device = None if job.device == "auto" else job.device
    options: dict[str, Any] = {"device": device, "dtype": job.dtype, "batch_tokens": job.batch_tokens}
    try:
        if "bundle" in job.source:
            return HFEngine.from_bundle(job.source["bundle"], base=job.source.get("base", "16bit"), **options)
        return HFEngine.from_checkpoint(Source(**job.source), trust_remote_code=job.trust_remote_code, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise PolymergeError("out of memory while loading") from None


def measurement(data: dict[str, Any]) -> Measurement:
    """A measurement as it was emitted or remembered."""
    return Measurement(**data)


def _memory(engine: Engine) -> dict[str, Any]:
    import torch

    from ..host import peak_memory

    device = getattr(engine, "device", None)
    on_gpu = device is not None and device.type == "cuda"
    model = getattr(engine, "model", None)
    tensors = list(model.parameters()) + list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    return {
        "peak_memory": torch.cuda.max_memory_allocated(device) if on_gpu else peak_memory(),
        "on_gpu": on_gpu,
        "weights_bytes": sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values()),
    }


def main() -> None:
    """The process: one job from standard input."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        lines.write(json.dumps(event) + "\n")

    data = json.load(sys.stdin)
    job = CandidateJob(**{**data, "ask": AskSettings(**data["ask"]), "work": [tuple(item) for item in data["work"]]})
    try:
        engine = load_engine(job)
        emit({"event": "loaded"})
        run_job(job, engine, emit)
    except PolymergeError as error:
        emit({"event": "failed", "expert": None, "task": None, "reason": str(error)})


def as_json(job: CandidateJob) -> str:
    """A job as the worker reads it."""
    return json.dumps(asdict(job))


if __name__ == "__main__":
    main()
