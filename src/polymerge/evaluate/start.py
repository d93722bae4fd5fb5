"""What `polymerge eval` starts: a bundle, the engine that remembers its answers, and lm-evaluation-harness on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.place import file_to_write
from ..router.loading import load_router
from .compare import Comparison, evaluate_modes, write_results
from .run import HarnessSettings, require_harness
from .tasks import task_list

if TYPE_CHECKING:
    from ..engine.base import Engine
    from ..engine.wrappers.cached import OnRequests

ROUTED = {"routed", "mixture"}


def evaluate_bundle(
    bundle: str | Path,
    *,
    tasks: str | Sequence[str] | None = None,
    data: str | Path | None = None,
    mode: Sequence[str] | None = None,
    best: Mapping[str, str] | None = None,
    label: str | None = None,
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool | None = None,
    fewshot_as_multiturn: bool = False,
    system_instruction: str | None = None,
    gen_kwargs: str | None = None,
    log_samples: bool = False,
    seed: int = 0,
    batch_tokens: int = 4096,
    device: str | None = None,
    base: str = "16bit",
    no_cache: bool = False,
    output: str | Path | None = None,
    progress: OnRequests | None = None,
) -> Comparison:
    """Measures a bundle with lm-evaluation-harness: its tasks or your own data, by any mode.

    Args:
        tasks: names or patterns of the harness, YAML files, data sets of `data`; by default all of these.
        data: a folder whose every NAME/test.jsonl is a task.
        mode: average, expert:NAME, routed, mixture or oracle, one or several; by default the average.
        best: label -> expert for oracle, where the names differ. `label`: the rows' key with oracle's label.
        include_path: a folder with task YAML files.
        limit: questions of each task: a number, or a share below 1.
        apply_chat_template: by default with `data`, where there is a template.
        num_fewshot, fewshot_as_multiturn, system_instruction, gen_kwargs, log_samples: the harness's own.
        base: of the average in memory, as `load_model` takes it.
        no_cache: ask what was answered before again.
        output: where the harness's whole results are written.
        progress: called with the requests that are done and all of them.

    Raises:
        MissingExtraError: lm-eval is not installed. RecipeError: an unknown task or unusable data. ModelError: a mode
        that cannot work. RouterError: a mode that needs a router, and the bundle has none.
    """
    from ..engine.local.engine import HFEngine
    from ..engine.wrappers.cached import CachedEngine, answers_file

    require_harness()  # before a model is loaded
    output = file_to_write(output) if output is not None else None
    engine = HFEngine.from_bundle(bundle, device=device, base=base, batch_tokens=batch_tokens)
    template = engine.tokenizer.chat_template
    chat = bool(data and template) if apply_chat_template is None else apply_chat_template
    modes = [mode] if isinstance(mode, str) else list(mode or ["average"])
    routing = _routing(bundle, engine, device) if ROUTED & {*modes} else {}
    file = None if no_cache else answers_file(engine)
    names = tasks if tasks is None or isinstance(tasks, str) else ",".join(tasks)
    comparison = evaluate_modes(
        CachedEngine(engine, file, salt={"device": str(engine.device)}, progress=progress),
        task_list(names, Path(data) if data else None, ending="" if chat else "\n"),
        modes,
        best=best or {},
        label=label,
        include_path=include_path,
        tokenizer=engine.tokenizer,
        tokenizer_of=engine.tokenizer_of,
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
        write_results(comparison, output)
    return comparison


def _routing(bundle: str | Path, engine: Engine, device: str | None) -> dict[str, Any]:
    """The bundle's router, which embeds with the loaded engine unless it was fitted with another model."""
    router = load_router(bundle, device, engine=engine)
    return {"router": router, "fields": router.record.experts, "about": {"router": router.fingerprint}}
