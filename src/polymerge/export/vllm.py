"""All experts of a bundle as a folder that `vllm serve` takes: the average, and one LoRA adapter an expert.

What vLLM cannot express is folded into the factors: rho_i W̄ + B_i A_i, with the gains of the expert's own norm in its
columns, is taken against W̄ again and factorised at the rank to which vLLM pads all adapters anyway. What is left is in
the plan (`vllm_plan`) before anything is written, and what the whole costs is measured (`calibrate`).

Holds one tensor of one expert at a time, and the running model while it measures.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, assemble
from ..bundle import ADAPTER_FILE, PEFT_PREFIX, ExpertReader
from ..checkpoint import read_json
from ..engine.vllm_folder import NOTE, ServedExpert, VllmNote, serve_arguments
from ..errors import ModelError
from ..executor import pick_device
from ..merger import OnProgress, Progress, peak_memory
from ..rsvd import rsvd, sketch_seed
from ..staging import (
    DTYPE_NAMES,
    Entry,
    check_free_space,
    disk_errors,
    raw_bytes,
    write_bytes,
    write_json,
    write_safetensors,
)
from .calibrate import Measured, Sample, builtin_samples, calibrate, check_tokenizer
from .norms import gain_ratio, norm_modules
from .place import fresh, publish
from .vllm_plan import Factored, VllmPlan


@dataclass(frozen=True)
class VllmExport:
    """A written folder and its note."""

    folder: Path
    note: VllmNote

    @property
    def command(self) -> list[str]:
        """What serves the folder."""
        return ["vllm", "serve", str(self.folder.resolve()), *serve_arguments(self.folder, self.note)]


def export_vllm(
    plan: VllmPlan,
    output: str | Path,
    *,
    samples: Sequence[Sample] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> VllmExport:
    """Writes a plan's folder and measures what was lost.

    Args:
        samples: prompts (and answers) to measure on; by default a handful of built-in ones.
        device: of the factorisation and the measurement.

    Raises:
        ModelError, OutputExistsError, DiskSpaceError: before anything is written. The first for an expert that is the
            average as far as vLLM can tell them apart, and for a bundle without a tokenizer.
    """
    bundle, output = plan.bundle, Path(output).expanduser()
    place = pick_device(device)
    empty = [expert for expert, tasks in plan.experts.items() if not tasks]
    if empty:  # vLLM refuses an empty adapter
        raise ModelError(
            f"{bundle.path}: expert {empty[0]!r} has nothing that an adapter could hold; serve the bundle as it is"
        )
    check_tokenizer(bundle)
    check_free_space(output.parent, bundle.sizes().base + plan.adapter_bytes)
    staged = fresh(output, overwrite=overwrite)
    assemble.copy_model_files(bundle.path, staged, read_json(bundle.path / "config.json"), code=True)
    with disk_errors(output.parent):
        for file in (name for name in bundle.manifest.files if "/" not in name and ".safetensors" in name):
            shutil.copyfile(bundle.path / file, staged / file)
    clock = _Clock(plan, progress)
    writer = _Writer(plan, place, clock)
    folders = {expert: staged / _adapter(expert) for expert in plan.experts}
    for expert, folder in folders.items():
        writer.write(expert, folder)
    measured = calibrate(bundle, folders, samples or builtin_samples(), place, progress=clock.measured)
    note = _note(plan, measured)
    write_bytes(staged / NOTE, note.to_json().encode())
    folder = publish(staged, output)
    return VllmExport(folder, note)


class _Writer:
    """Makes and writes adapters, one tensor at a time."""

    def __init__(self, plan: VllmPlan, device: torch.device, clock: _Clock) -> None:
        self.plan, self.device, self.clock = plan, device, clock
        self._norms = norm_modules(plan.bundle.path)

    def write(self, expert: str, folder: Path) -> None:
        tasks, dtype = self.plan.experts[expert], self.plan.dtype
        shapes = {key: shape for task in tasks for key, shape in task.shapes.items()}
        entries: list[Entry] = [
            (PEFT_PREFIX + key, DTYPE_NAMES[dtype], shape, shape[0] * shape[1] * dtype.itemsize)
            for key, shape in shapes.items()
        ]
        # As far as PEFT's patterns go, a lookup's factors are like any others.
        ranks = [(f"{task.module}.lora_A.weight", (task.rank, task.shape[1])) for task in tasks]
        config = assemble.adapter_config(ranks, self.plan.bundle.layers.values(), tied_embedding=None)
        write_json(folder / "adapter_config.json", config)
        write_safetensors(folder / ADAPTER_FILE, entries, self._contents(expert))

    def _contents(self, expert: str) -> Iterator[bytes]:
        reader = self.plan.bundle.expert_reader(expert)
        for task in self.plan.experts[expert]:
            b, a = self._factors(expert, task, reader)
            for factor in (a, b):
                yield bytes(raw_bytes(factor.to(self.plan.dtype).cpu()))
            self.clock.factored(expert, task)

    def _factors(self, expert: str, task: Factored, reader: ExpertReader) -> tuple[Tensor, Tensor]:
        """B [out, r] and A [r, in]: W̄ + B A is as near as this rank comes to the expert's matrix."""
        method, tensor = self.plan.bundle.manifest.method, task.layer.tensor
        weight = reader.read(tensor).to(self.device)
        if task.norm:
            ratio = self._ratio(task.norm, reader).to(weight)
            weight.mul_(ratio[:, None] if task.layer.transposed else ratio)
        residual = weight.sub_(self.plan.bundle.base_tensor(tensor).to(weight))
        matrix = residual.T if task.layer.transposed or task.embedding else residual  # [out, in]
        seed = sketch_seed(method.seed, tensor, expert, task.module)
        return rsvd(matrix, task.rank, n_oversamples=method.n_oversamples, n_iter=method.n_iter, seed=seed)

    def _ratio(self, norm: str, reader: ExpertReader) -> Tensor:
        tensor = self.plan.norms[norm]
        ratio = gain_ratio(self._norms[norm], reader.read(tensor), self.plan.bundle.base_tensor(tensor))
        assert ratio is not None  # the plan folds no other norm
        return ratio


def _adapter(expert: str) -> str:
    return f"adapters/{expert}"


def _note(plan: VllmPlan, measured: dict[str, Measured]) -> VllmNote:
    experts = {
        expert: ServedExpert(
            adapter=_adapter(expert),
            kl=found.kl,
            kl_unfolded=found.kl_unfolded,
            kl_average=found.kl_average,
            same_token=found.same_token,
            probe=found.probe,
        )
        for expert, found in measured.items()
    }
    return VllmNote(
        polymerge_version=__version__,
        bundle=plan.bundle.digest,
        dtype=plan.bundle.manifest.dtype,
        max_lora_rank=plan.max_lora_rank,
        base_bytes=plan.bundle.sizes().base,
        slot_bytes=plan.slot_bytes,
        calibration_tokens=sum(found.tokens for found in measured.values()),
        experts=experts,
        lost=plan.lost,
    )


class _Clock:
    """Counts the work in bytes of factors; measuring an expert counts as a tenth of its factors."""

    def __init__(self, plan: VllmPlan, progress: OnProgress | None) -> None:
        self._progress, self._began, self._done = progress, time.monotonic(), 0
        self._measuring = plan.adapter_bytes // (10 * max(len(plan.experts), 1)) + 1
        self._total = plan.adapter_bytes + self._measuring * len(plan.experts)
        self._itemsize = plan.dtype.itemsize

    def factored(self, expert: str, task: Factored) -> None:
        self._tick(f"{expert}: {task.module}", task.numel * self._itemsize)

    def measured(self, expert: str) -> None:
        self._tick(f"{expert}: measured", self._measuring)

    def _tick(self, what: str, amount: int) -> None:
        self._done += amount
        if self._progress:
            seconds = time.monotonic() - self._began
            left = seconds * (self._total - self._done) / self._done
            self._progress(Progress(self._done, self._total, what, seconds, left, peak_memory(), 0))
