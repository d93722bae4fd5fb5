"""`polymerge eval`: lm-evaluation-harness on a bundle, by one mode or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .words import Base


def eval(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    tasks: Annotated[
        str | None,
        typer.Option(help="Separated by commas: names or patterns of the harness, YAML files, data sets of --data."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Your data: each NAME/test.jsonl in this folder is a task.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="average, expert:NAME, routed, mixture or oracle. May be repeated.")
    ] = None,
    best: Annotated[list[str] | None, typer.Option(help="LABEL=EXPERT for oracle, where the names differ.")] = None,
    label: Annotated[str | None, typer.Option(help="The rows' key with oracle's label; by default the task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with task YAML files of your own.")] = None,
    limit: Annotated[float | None, typer.Option(help="Questions of each task: a number, or a share below 1.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Worked examples before each question.")] = None,
    apply_chat_template: Annotated[
        bool | None,
        typer.Option("--apply-chat-template/--no-chat-template", help="By default with --data, where there is one."),
    ] = None,
    fewshot_as_multiturn: Annotated[bool, typer.Option("--fewshot-as-multiturn", help="Examples as turns.")] = False,
    system_instruction: Annotated[str | None, typer.Option(help="Put before every question.")] = None,
    gen_kwargs: Annotated[str | None, typer.Option(help="Changes the tasks' own: max_gen_toks=64,until=...")] = None,
    log_samples: Annotated[bool, typer.Option("--log-samples", help="Keep every answer in --output.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch at most, padding included.")] = 4096,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    base: Base = "16bit",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Ask what was answered before again.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the harness's whole results.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a bundle with lm-evaluation-harness: its tasks or your own data, by any mode."""
    from .console import print_json
    from .evaluating import print_evaluation, request_progress
    from .logs import hush_harness

    hush_harness()
    from ..evaluate.start import evaluate_bundle
    from .words import read_pairs

    with request_progress(quiet or as_json) as progress:
        comparison = evaluate_bundle(
            bundle, tasks=tasks, data=data, mode=mode, best=read_pairs(best, "LABEL=EXPERT"), label=label,
            include_path=include_path, limit=limit, num_fewshot=num_fewshot, apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn, system_instruction=system_instruction, gen_kwargs=gen_kwargs,
            log_samples=log_samples, seed=seed, batch_tokens=batch_tokens, device=device, base=base, no_cache=no_cache,
            output=output, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(comparison.summary())
    else:
        print_evaluation(comparison)
