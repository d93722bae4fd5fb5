"""A merge, at the recipe's own rate and code or at those that reach a target.

Knows the order: plan, search where there is a target, merge. Finding is `polymerge.search.find`, the merge itself
`polymerge.merging.run`; who does the tensors is chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal, Unpack

from ..bundle.bundle import Bundle
from ..bundle.place import check_output
from ..errors import PolymergeError, TargetError
from ..merging.executor import Executor, in_threads
from ..merging.plan import MergePlan, plan_merge, replanned
from ..merging.ray import ray_cluster
from ..merging.run import OnProgress, run_plan
from ..method.codes import PLAIN
from ..paths import path_of
from ..recipe.merge import RecipeLike, RecipeSettings
from ..recipe.rates import in_words
from ..sources.memory import models_as_folders
from .agreement import Agreement
from .calibrate import calibrated
from .examples import Prompts, read_prompts
from .find import Found, find
from .sweep import agreements, check_examples, run_originals
from .target import Target, read_target

Where = Literal["threads", "ray"]


def merge(
    recipe: RecipeLike,
    output: str | Path,
    *,
    target: str | None = None,
    prompts: Prompts | None = None,
    codes: Sequence[str] | None = None,
    limit: int | None = None,
    executor: Executor | Where = "threads",
    address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: OnProgress | None = None,
    say: Callable[[str], None] | None = None,
    on_plan: Callable[[MergePlan], None] | None = None,
    on_found: Callable[[Found], None] | None = None,
    on_measured: Callable[[Mapping[str, Agreement]], None] | None = None,
    **settings: Unpack[RecipeSettings],
) -> Bundle:
    """Merges the recipe's experts into a bundle at `output`.

    The result depends only on the recipe and the sources: not on the workers or where they run, and not on whether
    the merge was killed and resumed. Nothing appears at `output` before the bundle is whole.

    Args:
        recipe: a Recipe, its dict, the experts alone as {name: source}, or a YAML file. A source may also be a model
            in memory, of transformers or PEFT, or a pair of it and its tokenizer.
        target: `kl=0.001`, `accuracy=99%`, `size=600MB` or `size=1.2x`: rate and code are found.
        prompts: expert -> its held-out requests. A target of KL or accuracy is measured on them; without a target,
            the bundle is, against the originals, once it is there.
        codes: with a target: those that may be used; by default all.
        limit: with prompts: rows of each file; by default 32.
        executor: who does the tensors: the threads of this process, a Ray cluster, or anything that does them.
        address: of the Ray cluster, host:port; by default RAY_ADDRESS or this machine.
        resume: go on with the half-done work of the same merge, if there is any.
        progress: called after every tensor.
        say: told what a search does.
        on_plan, on_found, on_measured: given the plan before any tensor is read, what a search found, and how near
            every expert is to its original, where there are prompts and no target.
        settings: keys of the recipe that count in the place of its own.

    Raises:
        RecipeError, SourceError: before any tensor is read, except for values that are not finite.
        OutputExistsError, DiskSpaceError: before any tensor is read.
        TargetError: the target cannot be read or reached, or the bundle, which stays, is over its size.
        ErrorBudgetExceeded: the bundle is whole, but a tensor's relative error is over `max_error`.
    """
    if address is not None and executor != "ray":
        raise PolymergeError("--address belongs to --executor ray")
    _check_together(target, prompts, codes, limit, settings)
    if prompts and target is None and on_measured is None:
        raise TargetError("prompts without a target are measured for `on_measured`; give it, or a target")
    tell = say or (lambda text: None)
    goal = read_target(target) if target is not None else None
    examples = read_prompts({} if prompts is None else prompts, limit)
    output = path_of(output, "output")
    if goal or not resume:  # now and not after the plan; a merge that is resumed clears up what a kill left first
        check_output(output, overwrite=overwrite)
    with models_as_folders(recipe, output) as (recipe, in_memory):
        plan, chosen = plan_merge(recipe, **settings), None
        for name, called in in_memory.items():
            checkpoint = plan.checkpoints[name]
            checkpoint.origin = replace(checkpoint.whence, source=called)
        if examples and not goal:
            check_examples(plan.recipe, examples)
        if on_plan:
            on_plan(plan)
        with _opened(executor, address) as tasks, calibrated(plan, examples, tell) as calibration:
            if goal:
                folder = next(parent for parent in output.absolute().parents if parent.exists())
                chosen = find(
                    plan.recipe,
                    goal,
                    examples,
                    codes=PLAIN if codes is None else codes,
                    folder=folder,
                    executor=tasks,
                    progress=say,
                    calibration=calibration,
                )
                _tell(chosen, goal, say, on_found)
                plan = replanned(plan, compress_rate=chosen.recipe.compress_rate, code=chosen.recipe.code)
            plan = replace(plan, calibration=calibration)
            bundle = run_plan(plan, output, overwrite=overwrite, resume=resume, executor=tasks, progress=progress)
        if chosen:
            chosen.check(bundle)
        elif examples and on_measured:
            on_measured(agreements(bundle, run_originals(plan.recipe, examples, tell)))
        return bundle


def _check_together(
    target: str | None,
    prompts: Prompts | None,
    codes: Sequence[str] | None,
    limit: int | None,
    settings: RecipeSettings,
) -> None:
    """Raises TargetError for arguments that would be ignored, or that a search would overrule."""
    if target is None:
        if codes is not None:
            raise TargetError("--codes belongs to --target")
        if limit is not None and not prompts:
            raise TargetError("--limit belongs to --prompts")
        return
    fixed = {"--compress-rate": settings.get("compress_rate"), "--code": settings.get("code")}
    for option in (name for name, value in fixed.items() if value is not None):
        raise TargetError(f"{option} is what --target finds; leave it out, or say which --codes may be used")


def _opened(executor: Executor | Where, address: str | None) -> AbstractContextManager[Executor]:
    if executor == "ray":
        return ray_cluster(address)
    if executor != "threads" and not callable(executor):
        raise PolymergeError(f"executor: {executor!r} does no tensors; give threads, ray, or a function that does")
    return nullcontext(in_threads if executor == "threads" else executor)


def _tell(
    chosen: Found, goal: Target, say: Callable[[str], None] | None, on_found: Callable[[Found], None] | None
) -> None:
    if say:
        rate, code, point = chosen.recipe.compress_rate, chosen.recipe.code, chosen.point
        words = f"{goal.words(point)}, measured merges: {chosen.merges}" if point else "no merge needed"
        say(f"found: compress rate {in_words(rate)} with code {code} ({words})")
    if on_found:
        on_found(chosen)
