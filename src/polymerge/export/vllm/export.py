"""All experts of a bundle as a folder that `vllm serve` takes: the average, and one LoRA adapter an expert.

What vLLM cannot express is folded into the factors: rho_i W̄ + B_i A_i, with the gains of the expert's own norm in its
columns, is taken against W̄ again and factorised at the rank to which vLLM pads all adapters anyway, for the inputs that
the layers see. What is left is in the plan (`vllm_plan`) before anything is written, and what the whole costs is
measured (`calibrate`).

Holds the running model, and one tensor of one expert at a time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...bundle.bundle import Bundle, ExpertReader
from ...bundle.files import (
    DTYPE_NAMES,
    Entry,
    Rows,
    entry_of,
    raw_bytes,
    write_bytes,
    write_json,
    write_safetensors,
)
from ...bundle.manifest import ADAPTER_FILE, stored_layers, stored_shape
from ...bundle.peft import PEFT_PREFIX, adapter_config
from ...bundle.personas import write_files
from ...bundle.place import settled
from ...bundle.reading import steady
from ...bundle.write import copy_model_files, write_weights
from ...engine.vllm.folder import NOTE, ServedExpert, VllmNote, serve_arguments
from ...errors import ModelError
from ...host import peak_memory, pick_device
from ...merging.run import OnProgress, Progress
from ...method.rsvd import rsvd, sketch_seed
from ...sources.checkpoint import read_json
from ...version import __version__
from ..place import placed
from .calibrate import Calibration, Measured, check_tokenizer
from .norms import gain_ratio, norm_modules
from .plan import HEAD, Factored, VllmPlan
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
    with placed(output, overwrite=overwrite, needed=needed) as staged, steady(bundle):
        copy_model_files(bundle.path, staged, read_json(bundle.path / "config.json"), code=True)
        _write_average(bundle, staged)
        clock, calibration = _Clock(plan, progress), Calibration(bundle, samples or builtin_prompts(), place)
        writer, measured = _Writer(plan, place, clock), {}
        for expert, tasks in plan.experts.items():
            sizes = calibration.input_sizes(expert, {task.module for task in tasks if not task.embedding})
            writer.write(expert, staged / _adapter(expert), sizes)
            write_files(staged / _adapter(expert), bundle.persona(expert), bundle.manifest.experts[expert].persona)
            measured[expert] = calibration.measure(expert, staged / _adapter(expert))
            clock.measured(expert)
        note = _note(plan, measured)
        write_bytes(staged / NOTE, note.to_json().encode())
    return VllmExport(output, note)


def _write_average(bundle: Bundle, folder: Path) -> None:
    """The weights of the average: the bundle's own files, or made where these are the model under adapters."""
    if all(layer.base == "average" for layer in bundle.manifest.layers):
        for file in (name for name in bundle.manifest.files if "/" not in name and ".safetensors" in name):
            shutil.copyfile(bundle.path / file, folder / file)
        return
    stored = stored_layers(bundle.manifest.layers)
    infos = {name: bundle.base.tensors[layers[0].tensor] for name, layers in stored.items()}
    entries = [
        entry_of(name, Rows(info.dtype or bundle.base_tensor(name).dtype, stored_shape(stored[name]), ()))
        for name, info in infos.items()
    ]

    def content(index: int) -> Iterator[bytes]:
        for layer in stored[entries[index].key]:
            tensor = bundle.average_tensor(layer.tensor)
            yield bytes(raw_bytes(tensor.to(bundle.base.tensors[layer.tensor].dtype or tensor.dtype)))

    write_weights(folder, entries, content)


class _Writer:
    """Makes and writes adapters, one tensor at a time."""

    def __init__(self, plan: VllmPlan, device: torch.device, clock: _Clock) -> None:
        self.plan, self.device, self.clock = plan, device, clock
        self._norms = norm_modules(plan.bundle.path)

    def write(self, expert: str, folder: Path, sizes: Mapping[str, Tensor]) -> None:
        """One expert's adapter. `sizes` are those of the layers' inputs, by module: [in]."""
        tasks, dtype = self.plan.experts[expert], self.plan.dtype
        shapes = {key: shape for task in tasks for key, shape in task.shapes.items()}
        entries = [
            Entry(PEFT_PREFIX + key, DTYPE_NAMES[dtype], shape, shape[0] * shape[1] * dtype.itemsize)
            for key, shape in shapes.items()
        ]
        config = adapter_config(shapes.items(), self.plan.bundle.layers.values(), tied_embedding=None)
        write_json(folder / "adapter_config.json", config)
        write_safetensors(folder / ADAPTER_FILE, entries, self._contents(expert, sizes))

    def _contents(self, expert: str, sizes: Mapping[str, Tensor]) -> Iterator[bytes]:
        reader = self.plan.bundle.expert_reader(expert)
        for task in self.plan.experts[expert]:
            b, a = self._factors(expert, task, reader, sizes.get(task.module))
            for factor in (a, b):
                yield bytes(raw_bytes(factor.to(self.plan.dtype).cpu()))
            self.clock.factored(expert, task)

    def _factors(self, expert: str, task: Factored, reader: ExpertReader, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """B [out, r] and A [r, in]: W̄ + B A is as near to the expert's matrix as this rank allows.

        The bundle's own factors stay as they are, and what is folded in gets the rank that is left. To fit both
        together would be nearer in every norm and was worse in every measurement: a norm's gains change all columns a
        little, which no low rank holds, and would push out directions that were trained.
        """
        tensor = task.layer.tensor
        target = self._target(task, reader)
        stored = reader.factors(tensor)
        if stored and task.embedding:
            stored = stored[1].T, stored[0].T
        seed = sketch_seed(self.plan.bundle.manifest.method.seed, tensor, expert, task.module)
        whole = task.layer.base == "adapters"  # all of what the average lacks and has too much, which is of low rank
        if stored is None or whole or task.rank == min(task.shape) or stored[1].shape[0] > task.rank:
            return self._fitted(target, task.rank, size, seed)
        b, a = (factor.to(self.device) for factor in stored)
        spare = task.rank - a.shape[0]
        if not spare:
            return b, a
        more_b, more_a = self._fitted(target.addmm_(b, a, alpha=-1.0), spare, size, seed)
        return torch.cat([b, more_b], dim=1), torch.cat([a, more_a])

    def _target(self, task: Factored, reader: ExpertReader) -> Tensor:
        """What the factors are to add to the average: [out, in], float32."""
        weight = reader.read(task.layer.tensor).to(self.device)
        if task.norm:
            ratio = self._ratio(task.norm, reader).to(weight)
            weight.mul_(ratio[:, None] if task.layer.transposed else ratio)
        weight.sub_(self._average(task.layer.tensor).to(weight))
        return weight.T if task.layer.transposed or task.embedding else weight

    def _average(self, tensor: str) -> Tensor:
        """As it is served: the experts' adapters give back what its rounding takes."""
        bundle = self.plan.bundle
        return bundle.average_tensor(tensor).to(bundle.base.tensors[tensor].dtype or self.plan.dtype)

    def _fitted(self, matrix: Tensor, rank: int, size: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """min ||(matrix - B A) diag(size)||: columns count by the size of what they are multiplied with."""
        method = self.plan.bundle.manifest.method
        scale = torch.ones(matrix.shape[1]).to(matrix) if size is None else size.to(matrix)
        b, a = rsvd(matrix * scale, rank, n_oversamples=method.n_oversamples, n_iter=method.n_iter, seed=seed)
        return b, a / scale

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
            kl=fit.kl,
            kl_unfolded=fit.kl_unfolded,
            kl_average=fit.kl_average,
            same_token=fit.same_token,
            probe=fit.probe,
            persona=plan.bundle.manifest.experts[expert].persona,
        )
        for expert, fit in measured.items()
    }
    return VllmNote(
        polymerge_version=__version__,
        bundle=plan.bundle.digest,
        dtype=plan.bundle.manifest.dtype,
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
