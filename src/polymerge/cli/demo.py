"""`polymerge demo`: three fine-tuned models become one bundle, and what it kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the bundle and the report.")] = Path(
        "demo-output"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Your skills: NAME/train.jsonl and NAME/test.jsonl in a folder.")
    ] = None,
    skills: Annotated[str | None, typer.Option(help="Which skills, separated by commas.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps for each expert.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=1e-8, help="Of the training, at its highest.")] = None,
    compress_rate: Annotated[float, typer.Option(help="Share of a residual's parameters to drop.")] = 0.95,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune three experts of SmolLM2-135M, merge them, and show what each keeps. Six minutes on two cores."""
    from ..demo.start import run_demo
    from .console import err, print_json, tell
    from .demonstrating import demo_listeners, print_demo
    from .interrupted import STOPPED
    from .logs import hush_libraries
    from .words import read_list

    hush_libraries()
    try:
        with demo_listeners(quiet or as_json) as listeners:
            result = run_demo(
                output, data=data, skills=read_list(skills), steps=steps, learning_rate=learning_rate,
                compress_rate=compress_rate, listeners=listeners,
            )  # fmt: skip
    except KeyboardInterrupt:
        tell("interrupted: experts that are trained lie in the cache; the same command goes on with the next", to=err)
        raise SystemExit(STOPPED) from None
    if as_json:
        print_json(result.to_json())
    else:
        print_demo(result)
