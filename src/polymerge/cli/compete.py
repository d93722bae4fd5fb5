"""`polymerge compete`: the competition's file in, its submission out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .words import Base


def compete(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    source: Annotated[Path, typer.Option("--input", help="CSV: id, input, eval_type, answer_choices, maybe target.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The submission: id, prediction, dummy_field.")],
    expert: Annotated[
        str | None,
        typer.Option(help="A name, average, math:0.7+code:0.3, or auto: the router, the default if there is one."),
    ] = None,
    staged: Annotated[bool, typer.Option("--staged/--direct", help="Let a thinker reason first.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="Take thinker, stages and memory_limit from this recipe.")] = None,
    thinker: Annotated[str | None, typer.Option(help="A source or the URL of an endpoint.")] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's name for the model.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoint's key.")] = None,
    policy: Annotated[str | None, typer.Option(help="always, never or auto, over the recipe's.")] = None,
    prompts: Annotated[str | None, typer.Option(help="v1 or v2, over the recipe's.")] = None,
    thought_tokens: Annotated[int | None, typer.Option(help="At most so many a thought.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--bare", help="Ask in each expert's chat template, or with bare prompts.")
    ] = False,
    few_shot: Annotated[
        Path | None, typer.Option(help="JSONL rows with prompt and answer, shown before every question.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A text before everything.")] = None,
    asking: Annotated[
        Literal["told", "auto"], typer.Option(help="As told, or as `stages --asking` found best on validation rows.")
    ] = "told",
    max_new_tokens: Annotated[int, typer.Option(help="Of a generated answer; 64 is the kit's.")] = 64,
    time_limit: Annotated[float, typer.Option(help="Minutes for all of it.")] = 60.0,
    memory_limit: Annotated[str | None, typer.Option(help="Such as 48GB; over it the thinker is unloaded.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows.")] = None,
    on_error: Annotated[
        Literal["fail", "skip"], typer.Option(help="A bad row: refuse the file, or leave its prediction empty.")
    ] = "fail",
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    base: Base = "16bit",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier submission.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a file of the LLM Merging Competition. Killed and started again, it goes on where it was."""
    from ..compete.start import run_competition
    from .competing import compete_plan, compete_progress, print_summary
    from .console import print_json
    from .logs import hush_libraries

    hush_libraries()
    summary = run_competition(
        bundle, source, output, expert=expert, staged=staged, recipe=recipe, thinker=thinker, model=model,
        key_env=key_env, policy=policy, prompts=prompts, thought_tokens=thought_tokens, chat=chat,
        few_shot=few_shot, system=system, asking=asking, max_new_tokens=max_new_tokens,
        time_limit=time_limit, memory_limit=memory_limit, limit=limit, on_error=on_error, device=device, base=base,
        overwrite=overwrite, progress=compete_progress(quiet), on_plan=compete_plan(quiet),
    )  # fmt: skip
    if as_json:
        print_json(summary.to_json())
    else:
        print_summary(summary, max_new_tokens)
