"""`polymerge export`: one expert out of the bundle, or all of them for vLLM or llama.cpp."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import PolymergeError

if TYPE_CHECKING:
    from ..export import PeftExport


def export(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    expert: Annotated[str | None, typer.Option(help="The expert's name; vLLM and llama.cpp get all of them.")] = None,
    to: Annotated[
        Literal["dense", "peft", "vllm", "gguf"],
        typer.Option(
            help="A dense checkpoint, an adapter for plain PEFT, or a folder for vLLM, or llama.cpp and Ollama."
        ),
    ] = "dense",
    dtype: Annotated[str | None, typer.Option(help="Of a dense checkpoint; by default the bundle's.")] = None,
    max_rank: Annotated[
        int | None, typer.Option(help="vLLM's --max-lora-rank, or of factors for llama.cpp; by default what fits.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Prompts to measure an export for vLLM or llama.cpp on: one a line, or JSON lines."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Of the work of an export for vLLM or llama.cpp: auto, cpu, cuda ...")
    ] = "auto",
    type_: Annotated[
        Literal["f32", "bf16", "f16", "q8_0", "q4_k_m"],
        typer.Option("--type", help="Of llama.cpp's base; q4_k_m needs its llama-quantize."),
    ] = "q8_0",
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Folder of llama.cpp's sources, whose converters then write the base.")
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="For llama.cpp: leave out what its adapters have no place for.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write one expert as a dense checkpoint or a PEFT adapter, or all experts for vLLM or llama.cpp."""
    from ..export import export_dense, export_peft
    from .console import print_json, say
    from .export_gguf import export_for_gguf
    from .export_vllm import export_for_vllm
    from .progress import waiting

    if to in ("vllm", "gguf") and (expert is not None or dtype is not None):
        raise PolymergeError(f"--to {to} takes all experts, and no dtype; leave --expert and --dtype out")
    if to == "gguf":
        export_for_gguf(
            bundle, output, type_, llama_cpp, max_rank, calibration, device,
            lossy=lossy, overwrite=overwrite, quiet=quiet, as_json=as_json,
        )  # fmt: skip
        return
    if type_ != "q8_0" or llama_cpp or lossy:
        raise PolymergeError("--type, --llama-cpp and --lossy belong to --to gguf")
    if to == "vllm":
        export_for_vllm(
            bundle, output, max_rank, calibration, device, overwrite=overwrite, quiet=quiet, as_json=as_json
        )
        return
    if max_rank is not None or calibration is not None or device != "auto":
        raise PolymergeError("--max-rank, --calibration and --device belong to --to vllm and --to gguf")
    if expert is None:
        raise PolymergeError(f"--to {to} needs --expert NAME")
    silent = quiet or as_json
    if to == "dense":
        with waiting(f"writing {output}", silent):
            folder = export_dense(bundle, expert, output, dtype=dtype, overwrite=overwrite)
        if as_json:
            print_json({"folder": str(folder), "form": "dense"})
        elif not quiet:
            say(f'{folder}: opens with AutoModelForCausalLM.from_pretrained("{folder}")')
        return
    with waiting(f"writing {output}", silent):
        written = export_peft(bundle, expert, output, overwrite=overwrite)
    if as_json:
        print_json({**asdict(written), "folder": str(written.folder), "form": "peft"})
    elif not quiet:
        _print_peft(written, bundle)


def _print_peft(written: PeftExport, bundle: Path) -> None:
    """Where a PEFT adapter is, and what plain PEFT leaves out of it."""
    from .console import say, tell

    say(f'{written.folder}: opens with PeftModel.from_pretrained(base, "{written.folder}") over {bundle}')
    if written.dropped_ratio_error:
        tell(
            f"plain PEFT has no place for the expert's scale ratios: without them a tensor is off by up to "
            f"{written.dropped_ratio_error:.2g} of its norm ({written.worst_tensor}), where compression lost "
            f"up to {written.compression_error:.2g}. Merge with `scale: shared` for an exact adapter."
        )
