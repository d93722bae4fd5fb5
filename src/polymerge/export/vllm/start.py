"""All experts of a bundle for vLLM in one call: what `polymerge export --to vllm` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...bundle.bundle import Bundle
from ...merging.run import OnProgress
from .export import VllmExport, write_vllm
from .plan import VllmPlan, plan_vllm
from .prompts import CalibrationPrompt, read_prompts


def export_vllm(
    bundle: Bundle | str | Path,
    output: str | Path,
    *,
    max_rank: int | None = None,
    calibration: str | Path | Sequence[CalibrationPrompt] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: OnProgress | None = None,
    on_plan: Callable[[VllmPlan], None] | None = None,
) -> VllmExport:
    """Writes the average and an adapter for every expert into a folder that vLLM serves, and measures what was lost.

    Args:
        max_rank: vLLM's --max-lora-rank; by default what fits.
        calibration: prompts to measure on, or their file: one a line, or JSON lines; by default a handful of built-in
            ones.
        device: of the factorisation and the measurement.
        on_plan: told, before anything is written, what vLLM cannot express.

    Raises:
        DataError: the prompts cannot be used. ModelError, OutputExistsError, DiskSpaceError: as `plan_vllm` and
        `write_vllm`.
    """
    samples = read_prompts(Path(calibration)) if isinstance(calibration, str | Path) else calibration
    plan = plan_vllm(bundle, max_rank=max_rank)
    if on_plan:
        on_plan(plan)
    return write_vllm(plan, output, samples=samples, device=device, overwrite=overwrite, progress=progress)
