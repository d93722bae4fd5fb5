"""All experts of a bundle as a folder that llama.cpp and Ollama take: base.gguf, and one LoRA adapter an expert.

What an adapter has no place for is folded into the factors as for vLLM (`polymerge.export.factors`). What is left is in
the plan, and refused unless the caller says so; what the whole costs is measured, with llama.cpp itself where it is
installed. Holds the running model, and one tensor of one expert at a time.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle.bundle import Bundle
from ...bundle.files import write_bytes
from ...bundle.personas import write_files
from ...bundle.place import settled
from ...bundle.reading import steady
from ...bundle.write import bundle_config, copy_model_files, ties
from ...engine.defaults import GenerationDefaults, checkpoint_defaults, folder_defaults
from ...engine.llamacpp.folder import ADAPTER, BASE, NOTE, GgufExpert, GgufNote, Kind, serve_command
from ...engine.llamacpp.server import installed
from ...errors import ModelError
from ...host import peak_memory, pick_device
from ...merging.run import OnProgress, Progress
from ...sources.checkpoint import read_json
from ...version import __version__
from ..average import write_average
from ..expressed import HEAD
from ..factors import FactorMaker, write_peft
from ..place import placed
from ..vllm.calibrate import Calibration, Measured, check_tokenizer
from ..vllm.prompts import CalibrationPrompt, builtin_prompts, read_prompts
from .adapters import check_pairs, write_lora
from .base import write_base
from .converter import quantize
from .forward import check_positions
from .measure import check_served, measure_served
from .modelfile import modelfile
from .plan import GgufPlan, plan_gguf
from .types import WRITABLE

# In the work folder while the export is made: the average as a checkpoint, for llama.cpp's converters.
AVERAGE_FOLDER = ".average"


@dataclass(frozen=True)
class GgufExport:
    """A written folder and its note."""

    folder: Path
    note: GgufNote

    @property
    def command(self) -> list[str]:
        """What serves the folder."""
        return serve_command(self.folder, self.note)


def export_gguf(
    bundle: str | Path,
    output: str | Path,
    *,
    type: Kind = "q8_0",
    llama_cpp: str | Path | None = None,
    lossy: bool = False,
    max_rank: int | None = None,
    calibration: str | Path | Sequence[CalibrationPrompt] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: OnProgress | None = None,
    on_plan: Callable[[GgufPlan], None] | None = None,
) -> GgufExport:
    """Writes the average and an adapter for every expert as GGUF files, and measures what was lost.

    Args:
        type: of the base; adapters over a quantised one have 8 bits.
        llama_cpp: the folder of llama.cpp's sources, whose converters then write the base.
        lossy: leave out what cannot be expressed; otherwise it is refused.
        max_rank: of the factors; by default what the bundle has.
        calibration: prompts to measure on, or their file: one a line, or JSON lines; by default a handful of built-in
            ones.
        device: of the factorisation and the measurement.
        on_plan: told, before anything is written, what llama.cpp cannot express.

    Raises:
        DataError: the prompts cannot be used. ModelError: as `plan_gguf`, or something cannot be expressed.
        OutputExistsError, DiskSpaceError: before anything is written.
    """
    samples = read_prompts(Path(calibration)) if isinstance(calibration, str | Path) else calibration
    plan = plan_gguf(bundle, type=type, max_rank=max_rank, llama_cpp=llama_cpp)
    if on_plan:
        on_plan(plan)
    if plan.lost and not lossy:
        more = f" (and {len(plan.lost) - 1} more)" if len(plan.lost) > 1 else ""
        raise ModelError(
            f"llama.cpp cannot express {plan.lost[0]}{more}; merge with `norms: average`, or leave it out with --lossy"
        )
    return write_gguf_folder(plan, output, samples=samples, device=device, overwrite=overwrite, progress=progress)


def write_gguf_folder(
    plan: GgufPlan,
    output: str | Path,
    *,
    samples: Sequence[CalibrationPrompt] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> GgufExport:
    """Writes a plan's folder. Arguments and errors as of `export_gguf`."""
    bundle, output = plan.bundle, settled(output)
    place = pick_device(device)
    empty = [expert for expert, tasks in plan.experts.items() if not tasks]
    if empty:
        raise ModelError(f"{bundle.path}: expert {empty[0]!r} has nothing that an adapter could hold")
    check_tokenizer(bundle)
    with placed(output, bundle, overwrite=overwrite, needed=plan.bytes) as staged, steady(bundle):
        copy_model_files(bundle.path, staged, _plain_config(bundle), code=True)
        steps = _Steps(len(plan.experts) + 2, progress)
        _base(plan, staged)
        steps.done("base")
        calibration = Calibration(bundle, samples or builtin_prompts(), place)
        factors = FactorMaker(bundle, plan.norms, place, plan.dtype)
        measured = {}
        for expert in plan.experts:
            measured[expert] = _expert(plan, expert, staged, factors, calibration)
            steps.done(f"{expert}: written and measured")
        shutil.rmtree(staged / AVERAGE_FOLDER, ignore_errors=True)
        note = _note(plan, staged, measured)
        if note.measured_with:
            served = measure_served(staged, note, calibration)
            experts = {name: e.model_copy(update={"served": served[name]}) for name, e in note.experts.items()}
            note = note.model_copy(update={"experts": experts})
            check_served(note)
        steps.done("measured with llama.cpp" if note.measured_with else "not measured with llama.cpp")
        write_bytes(staged / NOTE, note.to_json().encode())
    return GgufExport(output, note)


def _plain_config(bundle: Bundle) -> dict[str, Any]:
    return {k: v for k, v in read_json(bundle.path / "config.json").items() if k != "quantization_config"}


def _base(plan: GgufPlan, staged: Path) -> None:
    """base.gguf, and with llama.cpp's converters what they read the average from."""
    kind: Kind = plan.type if plan.type in WRITABLE else "f16"
    whole = staged / BASE if plan.quantizer is None else staged / f"whole-{BASE}"
    if plan.llama_cpp is None:
        assert plan.architecture is not None  # the plan is made for no other
        write_base(plan.bundle, plan.architecture, whole, kind, untied=plan.untied)
    else:
        _average(plan, staged / AVERAGE_FOLDER)
        plan.llama_cpp.base(staged / AVERAGE_FOLDER, whole, kind)
        check_positions(whole, plan.bundle.path)
    if plan.quantizer is not None:
        quantize(plan.quantizer, whole, staged / BASE, plan.type)
        whole.unlink()


def _average(plan: GgufPlan, folder: Path) -> None:
    """The average as a checkpoint, with a head of its own where experts change it."""
    bundle = plan.bundle
    folder.mkdir()
    said = read_json(bundle.path / "config.json")
    config = bundle_config(said, dtype=bundle.manifest.dtype, tied=not plan.untied and ties(said), code=True)
    copy_model_files(bundle.path, folder, config, code=True)
    write_average(bundle, folder, plain=True)
    if plan.untied:
        _add_head(plan, folder)


def _add_head(plan: GgufPlan, folder: Path) -> None:
    """A file more with the embedding under the head's name."""
    import json

    from safetensors.torch import save_file

    table = plan.bundle.average_tensor(f"{plan.bundle.manifest.tied_embedding}.weight")
    save_file({"lm_head.weight": table.clone()}, folder / "head.safetensors")
    index = folder / "model.safetensors.index.json"
    names = dict(read_json(index)["weight_map"]) if index.exists() else {}
    if not names:
        names = {layer.tensor: "model.safetensors" for layer in plan.bundle.layers.values()}
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**names, "lm_head.weight": "head.safetensors"}}))


def _expert(plan: GgufPlan, expert: str, staged: Path, factors: FactorMaker, calibration: Calibration) -> Measured:
    """One expert's folder: PEFT's adapter, which is measured and then written as llama.cpp's."""
    folder = staged / "experts" / expert
    tasks, peft = plan.experts[expert], staged / f".peft-{expert}"
    sizes = calibration.input_sizes(expert, {task.module for task in tasks if not task.embedding})
    write_peft(plan.bundle, tasks, factors.pairs(expert, tasks, sizes), peft, plan.dtype)
    measured = calibration.measure(expert, peft)
    folder.mkdir(parents=True)
    if plan.architecture is not None:
        write_lora(peft, plan.architecture, folder / ADAPTER, plan.adapter_type)
    else:
        assert plan.llama_cpp is not None
        turned = [task.module for task in tasks if task.layer.transposed]
        plan.llama_cpp.adapter(peft, staged / AVERAGE_FOLDER, folder / ADAPTER, plan.adapter_type, turned)
        check_pairs(folder / ADAPTER, staged / BASE, expert, head=any(task.module == HEAD for task in tasks))
    shutil.rmtree(peft)
    groups = plan.bundle.manifest.experts[expert].persona
    write_files(folder, plan.bundle.persona(expert), groups)
    tokenizer, defaults = _voice(plan, expert)
    base = Path(os.path.relpath(staged / BASE, folder)).as_posix()
    write_bytes(folder / "Modelfile", modelfile(expert, base, f"./{ADAPTER}", tokenizer, defaults).encode())
    return measured


def _voice(plan: GgufPlan, expert: str) -> tuple[object, GenerationDefaults]:
    """The tokenizer, with the expert's template, and the expert's settings."""
    from types import SimpleNamespace

    from ...sources.persona import load_tokenizer

    bundle = plan.bundle
    persona, groups = bundle.persona(expert), bundle.manifest.experts[expert].persona
    tokenizer = load_tokenizer(bundle.persona())
    if "template" in groups:
        tokenizer.chat_template = persona.chat_template
    if "generation" in groups:
        return tokenizer, checkpoint_defaults(SimpleNamespace(**persona.generation), tokenizer, f"expert {expert!r}")
    return tokenizer, folder_defaults(bundle.path, tokenizer)


def _note(plan: GgufPlan, staged: Path, measured: dict[str, Measured]) -> GgufNote:
    experts = {
        expert: GgufExpert(
            adapter=f"experts/{expert}/{ADAPTER}",
            bytes=(staged / "experts" / expert / ADAPTER).stat().st_size,
            persona=plan.bundle.manifest.experts[expert].persona,
            **fit.noted,
        )
        for expert, fit in measured.items()
    }
    return GgufNote(
        polymerge_version=__version__,
        bundle=plan.bundle.digest,
        type=plan.type,
        base_bytes=(staged / BASE).stat().st_size,
        context=int(plan.bundle.persona().max_length or 4096),
        written_by="llama.cpp" if plan.llama_cpp else "polymerge",
        measured_with=installed(),
        calibration_tokens=sum(fit.tokens for fit in measured.values()),
        experts=experts,
        lost=plan.lost,
        negligible=plan.negligible,
    )


class _Steps:
    """Counts what is done."""

    def __init__(self, total: int, progress: OnProgress | None) -> None:
        self._total, self._progress, self._count, self._began = total, progress, 0, time.monotonic()

    def done(self, what: str) -> None:
        self._count += 1
        if self._progress:
            seconds = time.monotonic() - self._began
            left = seconds * (self._total - self._count) / self._count
            self._progress(Progress(self._count, self._total, what, seconds, left, peak_memory(), 0))
