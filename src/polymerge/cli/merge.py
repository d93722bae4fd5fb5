"""`polymerge merge`: a recipe in, a bundle out."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..method.codes import CODES


class Where(StrEnum):
    """Who does the tensors."""

    threads = "threads"
    ray = "ray"


def merge(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")],
    compress_rate: Annotated[float | None, typer.Option(help="Instead of the recipe's.")] = None,
    code: Annotated[str | None, typer.Option(help=f"Instead of the recipe's: {', '.join(CODES)}.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Find rate and code: kl=0.001, accuracy=99%, size=600MB or size=1.2x (one model's)."),
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="For --target kl and accuracy: NAME=FILE.jsonl for every expert.")
    ] = None,
    codes: Annotated[
        str | None, typer.Option(help="For --target: those to choose from, separated by commas; by default all.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="For --prompts: rows of each file; by default 32.")] = None,
    workers: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    device: Annotated[str | None, typer.Option(help="Instead of the recipe's: auto, cpu, cuda, cuda:1 ...")] = None,
    executor: Annotated[Where, typer.Option(help="This process, or the machines of a Ray cluster.")] = Where.threads,
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
    from ..merging.executor import in_threads
    from ..merging.plan import plan_merge, replanned
    from ..merging.ray import ray_cluster
    from ..merging.run import run_plan
    from ..recipe.merge import load_recipe
    from .console import err, merge_progress, out, print_json, size
    from .searching import read_wanted

    if address is not None and executor is not Where.ray:
        raise typer.BadParameter("--address belongs to --executor ray")
    wanted = read_wanted(target, prompts, codes, limit, {"--compress-rate": compress_rate, "--code": code})
    changed: dict[str, Any] = {"compress_rate": compress_rate, "code": code, "workers": workers, "device": device}
    changed = {key: value for key, value in changed.items() if value is not None}
    parsed = load_recipe(recipe)
    plan = plan_merge(load_recipe({**parsed.model_dump(), **changed}) if changed else parsed)
    if not quiet:
        for note in plan.notes:
            err.print(f"note: {note}", markup=False)
    cluster = ray_cluster(address) if executor is Where.ray else nullcontext(in_threads)
    found = None
    with cluster as tasks, merge_progress(quiet or as_json) as progress:
        if wanted:
            found = wanted.find(plan.recipe, output, overwrite=overwrite, executor=tasks, quiet=quiet or as_json)
            plan = replanned(plan, compress_rate=found.recipe.compress_rate, code=found.recipe.code)
        bundle = run_plan(plan, output, overwrite=overwrite, resume=resume, executor=tasks, progress=progress)
    if found:
        found.check(bundle)
    sizes = bundle.sizes()
    if as_json:
        search = {"search": found.to_json()} if found else {}
        print_json({"bundle": str(output), **inspect_bundle(bundle).to_json(), **search})
    elif not quiet:
        out.print(
            f"{output}: {len(bundle.experts)} experts in {size(sizes.total)}, "
            f"{sizes.total / sizes.one_model:.2f} times one model ({size(sizes.separate_models)} apart)"
        )
        if found:
            found_by = f"--compress-rate {found.recipe.compress_rate:g} --code {found.recipe.code}"
            out.print(f"repeat: polymerge merge {recipe} -o {output} {found_by}", markup=False, soft_wrap=True)
        out.print(f"next: polymerge inspect {output}", markup=False)
