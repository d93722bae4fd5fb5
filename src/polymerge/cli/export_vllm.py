"""What `polymerge export --to vllm` prints: what will be lost, what was lost, and how to start vLLM."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from .console import err, out, print_json, say, size, tell
from .logs import hush_libraries
from .progress import merge_progress

MOST_LINES = 12


def export_for_vllm(
    bundle: Path,
    output: Path,
    max_rank: int | None,
    calibration: Path | None,
    device: str,
    *,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Plans, says what cannot be expressed, writes, and says what it cost."""
    from ..export import VllmExport, VllmPlan, export_vllm

    hush_libraries()

    def planned(plan: VllmPlan) -> None:
        for line in () if quiet else told_before("vLLM", plan.folded, plan.lost):
            err.print(line, markup=False, soft_wrap=True)
        folded.update(plan.folded)

    folded: dict[str, int] = {}
    with merge_progress(quiet or as_json, "exporting") as progress:
        written: VllmExport = export_vllm(
            bundle, output, max_rank=max_rank, calibration=calibration, device=device, overwrite=overwrite,
            progress=progress, on_plan=planned,
        )  # fmt: skip
    note = written.note
    if as_json:
        figures = note.model_dump(mode="json", exclude={"experts": {"__all__": {"probe"}}})
        print_json({"folder": str(output), "command": written.command, "folded": folded, **figures})
    elif not quiet:
        from rich.table import Table

        table = Table("expert", "KL of the export", "without folding", "of the average", "same likeliest token")
        for name, expert in note.experts.items():
            kls = (f"{value:.2g}" for value in (expert.kl, expert.kl_unfolded, expert.kl_average))
            table.add_row(name, *kls, f"{expert.same_token:.1%}")
        out.print(table)
        tell(
            f"{output}: KL in nats a token to the bundle's expert, over {note.calibration_tokens} tokens of answers; "
            f"base {size(note.base_bytes)}, a loaded adapter {size(note.slot_bytes)} in vLLM (ranks padded to "
            f"{note.max_lora_rank})"
        )
        say(f"next: {shlex.join(written.command)}")


def told_before(runtime: str, folded: dict[str, int], lost: tuple[str, ...]) -> list[str]:
    """What goes into the factors of a runtime's adapters, and what has no place."""
    lines = []
    if folded:
        lines.append("folded into the factors: " + ", ".join(f"{count} {kind}" for kind, count in folded.items()))
    lines += [f"{runtime} cannot express {line}" for line in lost[:MOST_LINES]]
    if len(lost) > MOST_LINES:
        kinds = Counter(line.split(": ", 2)[-1] for line in lost)
        more = ", ".join(f"{count} because {why}" for why, count in kinds.items())
        lines.append(f"... {len(lost)} tensors in all: {more}")
    return lines
