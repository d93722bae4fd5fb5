"""`polymerge export`: one expert out of the bundle, or all of them for vLLM."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import PolymergeError


def export(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    expert: Annotated[str | None, typer.Option(help="The expert's name; vLLM gets all of them.")] = None,
    to: Annotated[
        Literal["dense", "peft", "vllm"],
        typer.Option(help="A dense checkpoint, an adapter for plain PEFT, or a folder that vLLM serves."),
    ] = "dense",
    dtype: Annotated[str | None, typer.Option(help="Of a dense checkpoint; by default the bundle's.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="vLLM's --max-lora-rank; by default what fits.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Prompts to measure a vLLM export on: one a line, or JSON lines.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of a vLLM export's work: auto, cpu, cuda ...")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write one expert as a dense checkpoint or a PEFT adapter, or all experts as a folder that vLLM serves."""
    from ..export import export_dense, export_peft
    from .console import print_json, print_peft_export, say
    from .export_vllm import export_for_vllm

    if to == "vllm":
        if expert is not None or dtype is not None:
            raise PolymergeError("--to vllm takes all experts in the bundle's dtype; leave --expert and --dtype out")
        export_for_vllm(
            bundle, output, max_rank, calibration, device, overwrite=overwrite, quiet=quiet, as_json=as_json
        )
        return
    if max_rank is not None or calibration is not None or device != "auto":
        raise PolymergeError("--max-rank, --calibration and --device belong to --to vllm")
    if expert is None:
        raise PolymergeError(f"--to {to} needs --expert NAME")
    if to == "dense":
        folder = export_dense(bundle, expert, output, dtype=dtype, overwrite=overwrite)
        if as_json:
            print_json({"folder": str(folder), "form": "dense"})
        elif not quiet:
            say(f'{folder}: opens with AutoModelForCausalLM.from_pretrained("{folder}")')
        return
    written = export_peft(bundle, expert, output, overwrite=overwrite)
    if as_json:
        print_json({**asdict(written), "folder": str(written.folder), "form": "peft"})
    elif not quiet:
        print_peft_export(written, bundle)
