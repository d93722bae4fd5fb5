"""`polymerge export`: one expert out of the bundle."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Form(StrEnum):
    """What an expert can be exported as."""

    dense = "dense"
    peft = "peft"


def export(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    expert: Annotated[str, typer.Option(help="The expert's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    to: Annotated[Form, typer.Option(help="A dense checkpoint, or an adapter for plain PEFT.")] = Form.dense,
    dtype: Annotated[str | None, typer.Option(help="Of a dense checkpoint; by default the bundle's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write one expert as a dense checkpoint or as a PEFT adapter."""
    from ..export import export_dense, export_peft
    from .console import out, print_json

    if to is Form.dense:
        folder = export_dense(bundle, expert, output, dtype=dtype, overwrite=overwrite)
        if as_json:
            print_json({"folder": str(folder), "form": "dense"})
        elif not quiet:
            out.print(
                f'{folder}: opens with AutoModelForCausalLM.from_pretrained("{folder}")', markup=False, soft_wrap=True
            )
        return
    written = export_peft(bundle, expert, output, overwrite=overwrite)
    if as_json:
        print_json({**asdict(written), "folder": str(written.folder), "form": "peft"})
    elif not quiet:
        out.print(
            f'{output}: opens with PeftModel.from_pretrained(base, "{output}") over {bundle}',
            markup=False,
            soft_wrap=True,
        )
        if written.dropped_ratio_error:
            out.print(
                f"plain PEFT has no place for the expert's scale ratios: without them a tensor is off by up to "
                f"{written.dropped_ratio_error:.2g} of its norm ({written.worst_tensor}), where compression lost "
                f"up to {written.compression_error:.2g}. Merge with `scale: shared` for an exact adapter.",
                markup=False,
                soft_wrap=True,
            )
