"""All experts of a bundle as a folder that `vllm serve` takes: the average, and one LoRA adapter an expert.

What vLLM cannot express is folded into the factors: rho_i W̄ + B_i A_i, with the gains of the expert's own norm in its
columns, is taken against W̄ again and factorised at the rank to which vLLM pads all adapters anyway, for the inputs that
the layers see. What is left is in the plan (`vllm_plan`) before anything is written, and what the whole costs is
measured (`calibrate`).

Holds the running model, and one tensor of one expert at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...bundle.files import write_bytes
from ...bundle.personas import write_files
from ...bundle.place import settled
from ...bundle.reading import steady
from ...bundle.write import copy_model_files
from ...engine.exported import ExportedExpert
from ...engine.vllm.folder import NOTE, VllmNote, serve_arguments
from ...errors import ModelError
from ...host import peak_memory, pick_device
from ...merging.run import OnProgress, Progress
from ...version import __version__
from ..average import average_config, write_average
from ..expressed import HEAD, Factored
from ..factors import FactorMaker, write_peft
from ..place import placed
from .calibrate import Calibration, Measured, check_tokenizer
from .plan import VllmPlan
from .prompts import CalibrationPrompt, builtin_prompts


@dataclass(frozen=True)
class VllmExport:
    """A written folder and its note."""

    folder: Path
    note: VllmNote

    @property
    def command(self) -> list[str]:
        """What serves the folder."""
        return ["vllm", "serve", str(self.folder.resolve()), *serve_arguments(self.folder, self.note)]


def write_vllm(
    plan: VllmPlan,
    output: str | Path,
    *,
    samples: Sequence[CalibrationPrompt] | None = None,
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
    bundle, output = plan.bundle, settled(output)
    place = pick_device(device)
    empty = [expert for expert, tasks in plan.experts.items() if not tasks]
    if empty:  # vLLM refuses an empty adapter
        raise ModelError(
            f"{bundle.path}: expert {empty[0]!r} has nothing that an adapter could hold; serve the bundle as it is"
        )
    check_tokenizer(bundle)
    needed = bundle.sizes().base + plan.adapter_bytes
    with placed(output, bundle, overwrite=overwrite, needed=needed) as staged, steady(bundle):
        copy_model_files(bundle.path, staged, average_config(bundle), code=True)
        write_average(bundle, staged)
        clock, calibration = _Clock(plan, progress), Calibration(bundle, samples or builtin_prompts(), place)
        factors, measured = FactorMaker(bundle, plan.norms, place, plan.dtype), {}
        for expert, tasks in plan.experts.items():
            sizes = calibration.input_sizes(expert, {task.module for task in tasks if not task.embedding})
            _write_adapter(plan, expert, staged / _adapter(expert), sizes, factors, clock)
            write_files(staged / _adapter(expert), bundle.persona(expert), bundle.manifest.experts[expert].persona)
            measured[expert] = calibration.measure(expert, staged / _adapter(expert))
            clock.measured(expert)
        note = _note(plan, measured)
        write_bytes(staged / NOTE, note.to_json().encode())
    return VllmExport(output, note)


def _write_adapter(
    plan: VllmPlan, expert: str, folder: Path, sizes: Mapping[str, Tensor], factors: FactorMaker, clock: _Clock
) -> None:
    """One expert's adapter. `sizes` are those of the layers' inputs, by module: [in]."""
    pairs = factors.pairs(expert, plan.experts[expert], sizes, done=lambda task: clock.factored(expert, task))
    write_peft(plan.bundle, plan.experts[expert], pairs, folder, plan.dtype)


def _adapter(expert: str) -> str:
    return f"adapters/{expert}"


def _note(plan: VllmPlan, measured: dict[str, Measured]) -> VllmNote:
    experts = {
        expert: ExportedExpert(
            adapter=_adapter(expert),
            persona=plan.bundle.manifest.experts[expert].persona,
            **fit.noted,
        )
        for expert, fit in measured.items()
    }
    return VllmNote(
        polymerge_version=__version__,
        bundle=plan.bundle.digest,
        dtype=plan.dtype_name,
        max_lora_rank=plan.max_lora_rank,
        target_modules=plan.target_modules,
        head_adapters=HEAD in plan.target_modules,
        base_bytes=plan.bundle.sizes().base,
        slot_bytes=plan.slot_bytes,
        calibration_tokens=sum(fit.tokens for fit in measured.values()),
        experts=experts,
        lost=plan.lost,
    )


class _Clock:
    """Counts the work in bytes of factors; measuring an expert counts as a tenth of its factors.

    The time left is told once enough is done: the bundle is loaded and its inputs are looked at before the first
    factor, which says nothing of how long a factor takes.
    """

    TOLD_FROM = 0.02

    def __init__(self, plan: VllmPlan, progress: OnProgress | None) -> None:
        self._progress, self._began, self._done = progress, time.monotonic(), 0
        self._first: tuple[float, int] | None = None  # when the first factor was there, and what was done then
        self._measuring = plan.adapter_bytes // (10 * max(len(plan.experts), 1)) + 1
        self._total = plan.adapter_bytes + self._measuring * len(plan.experts)
        self._itemsize = plan.dtype.itemsize

    def factored(self, expert: str, task: Factored) -> None:
        self._tick(f"{expert}: {task.module}", task.numel * self._itemsize)

    def measured(self, expert: str) -> None:
        self._tick(f"{expert}: measured", self._measuring)

    def _tick(self, what: str, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        self._first = self._first or (now, self._done)
        if self._progress:
            seconds, (since, before) = now - self._began, self._first
            told = self._done - before >= self.TOLD_FROM * self._total
            left = (now - since) * (self._total - self._done) / (self._done - before) if told else None
            self._progress(Progress(self._done, self._total, what, seconds, left, peak_memory(), 0))
