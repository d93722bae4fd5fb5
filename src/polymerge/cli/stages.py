"""`polymerge stages`: where does thinking help?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def stages(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    data: Annotated[list[str], typer.Argument(help="FIELD=FILE: validation rows as JSON lines (prompt, answer).")],
    recipe: Annotated[Path | None, typer.Option(help="Take thinker and stages from this recipe.")] = None,
    thinker: Annotated[str | None, typer.Option(help="A source or the URL of an endpoint.")] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's name for the model.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoint's key.")] = None,
    thought_tokens: Annotated[int | None, typer.Option(help="At most so many a thought.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows of every field.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer in free text.")] = 64,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the chat template, if there is one.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    votes: Annotated[
        list[int] | None,
        typer.Option("--votes", help="Also free against constrained answers, after so many thoughts; give it again."),
    ] = None,
    think: Annotated[bool, typer.Option("--think/--no-think", help="Measure thinking.")] = True,
    asking: Annotated[
        bool, typer.Option("--asking", help="Also the ways of asking: bare, --chat, and what is said before.")
    ] = False,
    few_shot: Annotated[
        Path | None, typer.Option(help="Of --asking: JSONL rows with prompt and answer, shown before every question.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Of --asking: a text before everything.")] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Note it in the bundle, for what is auto.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure on validation data where a thinker helps, direct answers against both prompts, and how to ask."""
    from ..staged.ablation import validate_stages
    from .answering import print_evidence
    from .console import err, print_json
    from .logs import hush_libraries
    from .words import read_pairs

    hush_libraries()
    say = None if quiet else lambda field, way, rows: err.print(f"{field}: {way}, {rows} rows", soft_wrap=True)
    evidence = validate_stages(
        bundle, read_pairs(data, "FIELD=FILE"), recipe=recipe, thinker=thinker, model=model, key_env=key_env,
        thought_tokens=thought_tokens, limit=limit, max_new_tokens=max_new_tokens, chat=chat, device=device,
        votes=votes, think=think, asking=asking, few_shot=few_shot, system=system, save=save, progress=say,
    )  # fmt: skip
    if as_json:
        print_json(evidence.model_dump(mode="json"))
    else:
        print_evidence(evidence)
