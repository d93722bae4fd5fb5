"""`polymerge merge`: a recipe in, a bundle out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .words import (
    Align,
    Calibration,
    Code,
    CompressRate,
    DType,
    EmbeddingRate,
    Embeddings,
    LmHead,
    Method,
    Norms,
    RecipeOrExperts,
    Scale,
    read_list,
    read_pairs,
    read_recipe,
)

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..merging.plan import MergePlan
    from ..search.agreement import Agreement
    from ..search.find import Found


def merge(
    recipe: RecipeOrExperts,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")],
    compress_rate: CompressRate = None,
    code: Code = None,
    scale: Scale = None,
    dtype: DType = None,
    embeddings: Embeddings = None,
    lm_head: LmHead = None,
    embedding_rate: EmbeddingRate = None,
    norms: Norms = None,
    align: Align = None,
    method: Method = None,
    calibration: Calibration = None,
    target: Annotated[
        str | None,
        typer.Option(help="Find rate and code: kl=0.001, accuracy=99%, size=600MB or size=1.2x (one model's)."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Held-out requests, NAME=FILE.jsonl for every expert: what each keeps."),
    ] = None,
    codes: Annotated[
        str | None,
        typer.Option(help="For --target: those to choose from, separated by commas; by default factors, int8, int4."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="For --prompts: rows of each file; by default 32.")] = None,
    workers: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    device: Annotated[str | None, typer.Option(help="Instead of the recipe's: auto, cpu, cuda, cuda:1 ...")] = None,
    executor: Annotated[
        Literal["threads", "ray"], typer.Option(help="This process, or the machines of a Ray cluster.")
    ] = "threads",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster, host:port; by default RAY_ADDRESS or this machine.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a merge that was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at the output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Merge the recipe's experts into one bundle."""
    from ..bundle.inspect import inspect_bundle
    from ..search.merge import merge as run
    from .console import err, out, print_json, tell
    from .interrupted import half_done_work, interruptible
    from .logs import hush_libraries
    from .progress import merge_progress, waiting
    from .verdicts import print_measured, print_verdicts

    if target is not None or prompts or calibration:
        hush_libraries()
    searched: list[Found] = []
    measured: list[Mapping[str, Agreement]] = []
    plans: list[MergePlan] = []

    def notes(plan: MergePlan) -> None:
        looked()
        if plan.recipe.calibration:
            hush_libraries()
        plans.append(plan)
        for note in (*plan.notes, *plan.personas.hints):
            if not quiet:
                tell(f"note: {note}", to=err)

    def say(text: str) -> None:
        if not (quiet or as_json):
            err.print(text, markup=False, soft_wrap=True)

    kept: dict[str, Any] = {
        "scale": scale,
        "dtype": dtype,
        "embeddings": embeddings,
        "lm_head": lm_head,
        "embedding_rate": embedding_rate,
        "norms": norms,
        "align": align,
        "method": method,
    }
    texts = read_pairs(calibration, "NAME=FILE") if calibration else None
    half_done_work(output, resume=resume, say=say)
    silent = quiet or as_json
    if overwrite and (output / "router").is_dir() and not silent:
        again = f"polymerge router fit {shlex.quote(str(output))} --data DIR"
        tell(f"note: the router in {output} goes with the bundle that is replaced; afterwards: {again}", to=err)
    with (
        waiting("looking at the sources", silent) as looked,
        merge_progress(silent) as progress,
        interruptible(output, progress) as progress,
    ):
        bundle = run(
            read_recipe(recipe), output, target=target,
            prompts=read_pairs(prompts, "NAME=FILE") if prompts else None, codes=read_list(codes), limit=limit,
            executor=executor, address=address, resume=resume, overwrite=overwrite, progress=progress, say=say,
            on_plan=notes, on_found=searched.append,
            on_measured=measured.append, compress_rate=compress_rate, code=code, workers=workers,
            device=device, calibration=texts, **kept,
        )  # fmt: skip
    if as_json:
        print_json(_data(bundle, output, searched, measured))
    elif not quiet:
        options = [word for key, value in kept.items() if value is not None for word in _option(key, value)]
        options += [word for pair in calibration or () for word in _option("calibration", pair)]
        command = ["polymerge", "merge", *recipe, "-o", str(output), *options]
        _print(bundle, output, searched, command)
        _print_costs(plans[-1], bundle)
        if measured:
            given = [word for pair in prompts or () for word in _option("prompts", pair)]
            given += _option("limit", limit) if limit else []
            print_measured(measured[-1], shlex.join([*command, *given]))
        elif not searched:
            print_verdicts(inspect_bundle(bundle))
        out.print(f"next: polymerge inspect {shlex.quote(str(output))}", markup=False, soft_wrap=True)


def _option(key: str, value: object) -> list[str]:
    return [f"--{key.replace('_', '-')}", str(value)]


def _data(
    bundle: Bundle, output: Path, searched: list[Found], measured: list[Mapping[str, Agreement]]
) -> dict[str, Any]:
    from ..bundle.inspect import inspect_bundle

    search = {"search": searched[0].to_json()} if searched else {}
    kept = {"measured": {name: asdict(agreement) for name, agreement in measured[0].items()}} if measured else {}
    return {"bundle": str(output), **inspect_bundle(bundle).to_json(), **search, **kept}


def _print(bundle: Bundle, output: Path, searched: list[Found], command: list[str]) -> None:
    from ..bundle.inspect import alignments
    from ..recipe.rates import in_words
    from .console import say, size, tell

    sizes = bundle.sizes()
    tell(
        f"{output}: {len(bundle.experts)} experts in {size(sizes.total)}, "
        f"{sizes.total / sizes.one_model:.2f} times one model ({size(sizes.separate_models)} apart)"
    )
    for name, (before, after) in alignments(bundle).items():
        tell(f"{name}: {before:.2g} from {bundle.experts[0]} before it was aligned, {after:.2g} after")
    for chosen in searched:
        found = chosen.recipe
        at = {"compress_rate": in_words(found.compress_rate), "code": found.code}
        at |= {"embeddings": found.embeddings, "lm_head": found.lm_head}
        say(f"repeat: {shlex.join([*command, *(word for key in at for word in _option(key, at[key]))])}")


def _print_costs(plan: MergePlan, bundle: Bundle) -> None:
    """What residuals and tables cost and would cost, and how far averaged tables are from the experts' own."""
    from ..merging.choices import averaged, bytes_of_choices, bytes_of_codes, moved
    from .console import tell
    from .plan import embedding_costs, residual_costs

    costs, codes = bytes_of_choices(plan), bytes_of_codes(plan)
    if codes:
        tell(f"residuals of all experts ({plan.recipe.code}): {residual_costs(codes)}")
    if costs:
        tell(f"embeddings and heads of all experts: {embedding_costs(costs, plan.recipe.embedding_rate)}")
    if averaged(plan):
        apart = ", ".join(f"{expert} {share:.2g}" for expert, share in moved(plan, bundle).items())
        tell(f"averaged: they are from each expert's own, as a share of its norm: {apart}")
