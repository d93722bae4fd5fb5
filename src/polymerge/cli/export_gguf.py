"""What `polymerge export --to gguf` prints: what will be lost, what was lost, and how to start llama.cpp and Ollama."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..engine.llamacpp.folder import GgufNote, Kind
from .console import err, out, print_json, say, size, tell
from .export_vllm import told_before
from .logs import hush_libraries
from .progress import merge_progress


def export_for_gguf(
    bundle: Path,
    output: Path,
    type: Kind,
    llama_cpp: Path | None,
    max_rank: int | None,
    calibration: Path | None,
    device: str,
    *,
    lossy: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Plans, says what cannot be expressed, writes, and says what it cost."""
    from ..export import GgufPlan, export_gguf

    hush_libraries()

    def planned(plan: GgufPlan) -> None:
        for line in () if quiet else [*told_before("llama.cpp", plan.folded, plan.lost), *_within(plan.negligible)]:
            err.print(line, markup=False, soft_wrap=True)

    with merge_progress(quiet or as_json, "exporting", bytes=False) as progress:
        written = export_gguf(
            bundle, output, type=type, llama_cpp=llama_cpp, lossy=lossy, max_rank=max_rank, calibration=calibration,
            device=device, overwrite=overwrite, progress=progress, on_plan=planned,
        )  # fmt: skip
    note = written.note
    if as_json:
        figures = note.model_dump(mode="json", exclude={"experts": {"__all__": {"probe"}}})
        print_json({"folder": str(output), "command": written.command, **figures})
    elif not quiet:
        _print_note(note, output)
        say(f"next: {shlex.join(written.command)}")
        first = next(iter(note.experts))
        modelfile = output.resolve() / "experts" / first / "Modelfile"
        say(f"or: {shlex.join(['ollama', 'create', first, '-f', str(modelfile)])}")


def _within(negligible: tuple[str, ...]) -> list[str]:
    return [f"left out, the average's within the rounding of 16 bits: {line}" for line in negligible]


def _print_note(note: GgufNote, output: Path) -> None:
    from rich.table import Table

    table = Table(
        "expert", "bytes", "KL of the factors", "of the average", f"KL in llama.cpp ({note.type})", "same token"
    )
    for name, expert in note.experts.items():
        served = (
            (f"{expert.served.kl:.2g}", f"{expert.served.same_token:.1%}") if expert.served else ("not measured",) * 2
        )
        table.add_row(name, size(expert.bytes), f"{expert.kl:.2g}", f"{expert.kl_average:.2g}", *served)
    out.print(table)
    how = f"with {note.measured_with}" if note.measured_with else "not, since xllamacpp is not installed"
    tell(
        f"{output}: base {size(note.base_bytes)}; KL in nats a token to the bundle's expert, of the factors over "
        f"{note.calibration_tokens} tokens of answers; llama.cpp's own measured {how}"
    )
