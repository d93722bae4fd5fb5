"""`polymerge eval`: lm-evaluation-harness on a bundle, by one mode or several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..engine.base import Engine


def eval(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
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
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Ask what was answered before again.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the harness's whole results.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a bundle with lm-evaluation-harness: its tasks or your own data, by any mode."""
    from .console import hush_harness, print_evaluation, print_json, request_progress

    hush_harness()
    from ..engine.local.engine import HFEngine
    from ..engine.wrappers.cached import CachedEngine, answers_file
    from ..evaluate import HarnessSettings, evaluate_modes, task_list, write_results
    from .verify import named_sources

    engine = HFEngine.from_bundle(bundle, device=device, batch_tokens=batch_tokens)
    chat = bool(data and engine.tokenizer.chat_template) if apply_chat_template is None else apply_chat_template
    modes = mode or ["average"]
    routing = _router(bundle, engine, device) if {"routed", "mixture"} & {*modes} else {}
    with request_progress(quiet or as_json) as progress:
        file = None if no_cache else answers_file(engine)
        cached = CachedEngine(engine, file, salt={"device": str(engine.device)}, progress=progress)
        found = evaluate_modes(
            cached,
            task_list(tasks, data, ending="" if chat else "\n"),
            modes,
            best=named_sources(best or []),
            label=label,
            include_path=include_path,
            tokenizer=engine.tokenizer,
            settings=HarnessSettings(
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=fewshot_as_multiturn,
                system_instruction=system_instruction,
                gen_kwargs=gen_kwargs,
                log_samples=log_samples,
                seed=seed,
            ),
            **routing,
        )
    if output is not None:
        write_results(found, output)
    if as_json:
        print_json(found.summary())
    else:
        print_evaluation(found)


def _router(bundle: Path, engine: Engine, device: str | None) -> dict[str, Any]:
    """The bundle's router, which embeds with the loaded engine unless it was fitted with another model."""
    from ..engine.local.engine import HFEngine
    from ..router.opening import open_router

    router = open_router(bundle, lambda: engine, lambda model: HFEngine.from_checkpoint(model, device=device))
    return {"router": router, "fields": router.record.experts, "about": {"router": router.fingerprint}}
