"""What `polymerge compete` starts: a bundle's pipeline, and the run over a file of the competition."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import RecipeError
from ..recipe.merge import load_recipe
from ..recipe.numbers import parse_size
from ..staged.lead import Lead
from ..staged.opening import open_pipeline
from .clock import OnProgress
from .expected import OnPlan
from .pieces import OnError
from .run import MAX_NEW_TOKENS, Summary, compete


def run_competition(
    bundle: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    expert: str | None = None,
    staged: bool = False,
    recipe: str | Path | None = None,
    thinker: str | None = None,
    model: str | None = None,
    key_env: str | None = None,
    policy: str | None = None,
    prompts: str | None = None,
    thought_tokens: int | None = None,
    chat: bool = False,
    few_shot: str | Path | None = None,
    system: str | None = None,
    asking: Literal["told", "auto"] = "told",
    max_new_tokens: int = MAX_NEW_TOKENS,
    time_limit: float = 60.0,
    memory_limit: int | str | None = None,
    limit: int | None = None,
    on_error: OnError = "fail",
    device: str | None = None,
    base: str = "16bit",
    overwrite: bool = False,
    progress: OnProgress | None = None,
    on_plan: OnPlan | None = None,
) -> Summary:
    """Answers a file of the LLM Merging Competition. Killed and started again, it goes on where it was.

    Args:
        input: CSV with id, input, eval_type, answer_choices and perhaps target.
        output: the submission, with id, prediction and dummy_field.
        expert: a name, `average`, or `auto`: the bundle's router, which is the default if it has one.
        staged: let a thinker reason first; recipe, thinker, model, key_env, policy, prompts and thought_tokens are as
            for `generate`.
        chat: ask in each expert's chat template; off, prompts are bare, as in the kit.
        few_shot: JSONL rows with prompt and answer that are shown before every question.
        system: a text before everything.
        asking: `auto` takes these three, by field, as `polymerge stages --asking` found best on validation rows.
        max_new_tokens: of a generated answer; 64 is the kit's.
        time_limit: minutes for all of it.
        memory_limit: bytes, or a text such as 48GB; over it the thinker is unloaded. By default the recipe's.
        limit: only the first rows.
        on_plan: told what the run is expected to take before it begins.
        on_error: a bad row: `fail` refuses the file, `skip` leaves its prediction empty.

    Raises:
        PolymergeError: as `polymerge.compete.run.compete` and `open_pipeline`.
    """
    if asking == "auto" and (chat or few_shot or system):
        raise RecipeError("--asking auto takes --chat, --few-shot and --system from validation; leave them out")
    memory = _bytes(memory_limit) or (load_recipe(recipe).memory_limit if recipe else None)
    pipeline = open_pipeline(
        bundle, recipe=recipe, staged=staged, thinker=thinker, model=model, key_env=key_env, expert=expert,
        device=device, base=base, chat=chat, use=policy, prompts=prompts, thought_tokens=thought_tokens,
        lead=Lead.read(system, few_shot), asking=asking == "auto",
    )  # fmt: skip
    return compete(
        pipeline, input, output, limit=limit, time_limit=60 * time_limit, memory_limit=memory,
        max_new_tokens=max_new_tokens, on_error=on_error, overwrite=overwrite, progress=progress, on_plan=on_plan,
    )  # fmt: skip


def _bytes(limit: int | str | None) -> int | None:
    try:
        size: int | None = parse_size(limit)
    except ValueError as error:
        raise RecipeError(f"--memory-limit: {error}") from None
    return size
