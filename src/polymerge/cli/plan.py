"""`polymerge plan`: what a merge would write, read and need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .words import (
    Align,
    Base,
    Code,
    CompressRate,
    DType,
    EmbeddingRate,
    Embeddings,
    LmHead,
    Method,
    Norms,
    RecipeOrExperts,
    Residuals,
    Scale,
    read_recipe,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ..merging.footprint import Footprint
    from ..merging.plan import MergePlan
    from ..merging.room import Change
    from ..recipe.rates import AnyRates


def plan(
    recipe: RecipeOrExperts,
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
    base: Base = "16bit",
    residuals: Residuals = "decoded",
    gpu: Annotated[
        str | None, typer.Option(help="Its memory, such as 24GB, or auto: does it fit, and what change makes it fit?")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of one conversation; by default the model's whole context.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Conversations at once.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a merge will write, read and need in memory, without reading a weight."""
    from rich.markup import escape

    from ..merging.choices import averaged, bytes_of_choices, bytes_of_codes
    from ..merging.footprint import footprint
    from ..merging.plan import plan_merge
    from ..merging.room import cheapest_change
    from ..recipe.rates import in_words
    from .console import out, print_json, say, size, tell
    from .progress import waiting

    with waiting("looking at the sources", quiet=as_json):
        planned = plan_merge(
            read_recipe(recipe), weights=False, compress_rate=compress_rate, code=code, scale=scale, dtype=dtype,
            embeddings=embeddings, lm_head=lm_head, embedding_rate=embedding_rate, norms=norms, align=align,
            method=method, base=base, residuals=residuals, gpu=gpu, context=context, requests=requests,
        )  # fmt: skip
    change = cheapest_change(planned)
    needs, costs, codes = footprint(planned), bytes_of_choices(planned), bytes_of_codes(planned)
    summary = planned.summary() | {"embedding_bytes": costs, "code_bytes": codes, "answering": needs.to_json()}
    summary["change"] = {"words": change.words, "answering": change.needs.to_json()} if change else None
    if as_json:
        print_json(summary)
        return
    experts = summary["experts"]
    separate, written = summary["separate_models_bytes"], summary["write_bytes"]
    ranks = summary["ranks"]
    rate = escape(in_words(planned.recipe.compress_rate))
    out.print(f"[bold]{len(experts)} experts of {summary['architecture']}[/], compress rate {rate}")
    for name, source in experts.items():
        say(f"  {name}: {source}")
    spread = f"rank {ranks[0]} to {ranks[1]}" if ranks else "none"
    out.print(f"tensors      {summary['tensors']}, of which {summary['compressed_tensors']} compressed ({spread});")
    out.print(f"             linear layers found by {summary['layers_from']}")
    tell(
        f"writes       {size(written)} in {summary['dtype']}, at most "
        f"({written / separate:.0%} of {size(separate)} apart)",
        13,
    )
    out.print(f"  average    {size(summary['base_bytes'])}")
    of_residuals, its_own = size(summary["residual_bytes_per_expert"]), size(summary["own_bytes_per_expert"])
    tell(f"  an expert  {of_residuals} of residuals ({summary['code']}), {its_own} of its own tensors (norms ...)", 13)
    if summary["shared_bytes"]:
        less = size(summary["shared_bytes"])
        tell(f"             two experts mostly have one residual between them: {less} less are written then", 13)
    if codes:
        tell(f"residuals    of all experts: {residual_costs(codes)}", 13)
    if costs:
        tell(f"embeddings   of all experts, with the head: {embedding_costs(costs, planned.recipe.embedding_rate)}", 13)
    if averaged(planned):
        tell(
            "             averaged: experts that moved far lose most by it; the end of a merge says how far they did",
            13,
        )
    out.print(f"reads        {size(summary['read_bytes'])}")
    out.print(f"memory       about {size(summary['memory_bytes'])} beside the program itself")
    _print_footprint(needs, _held(planned, needs))
    _print_change(needs, change)
    for note in summary["notes"]:
        tell(f"note: {note}")


def residual_costs(costs: Mapping[str, int]) -> str:
    """Bytes of residuals in every code, in words."""
    from .console import size

    return ", ".join(f"{name} {size(count)}" for name, count in costs.items())


def embedding_costs(costs: Mapping[str, int], rates: AnyRates) -> str:
    """Bytes of embeddings and heads under every choice, in words."""
    from ..recipe.rates import in_words
    from .console import size

    at = {"compress": f" at {in_words(rates)}"}
    return ", ".join(f"{choice}{at.get(choice, '')} {size(count)}" for choice, count in costs.items())


def _print_footprint(needs: Footprint, held: Iterable[str]) -> None:
    """What answering needs in memory, part by part, against the limit."""
    from .console import out, size, tell

    out.print(f"answering    about {size(needs.total)} in memory, activations apart", end="")
    if needs.limit is not None:
        out.print(f", of {size(needs.limit)}: {'it fits' if needs.fits else '[red]it does not fit[/]'}", end="")
    out.print()
    out.print(f"  bundle     {size(needs.bundle)}, cache {size(needs.bundle_cache)} ({needs.bundle_tokens} tokens)")
    for line in held:
        tell(f"             {line}", 13)
    if needs.thinker:
        base = "" if needs.thinker_base == "16bit" else f" in {needs.thinker_base}"
        cache = f"cache {size(needs.thinker_cache)} ({needs.thinker_tokens} tokens)"
        out.print(f"  thinker    {size(needs.thinker)}{base}, {cache}")


def _held(plan: MergePlan, needs: Footprint) -> Iterator[str]:
    """What there is to say of how memory holds the bundle and its cache."""
    from dataclasses import replace

    from ..merging.footprint import held_bytes, times_decoded
    from ..model.held import stays_packed
    from .console import size

    if needs.base != "16bit":
        yield f"the average's linear layers in {needs.base}"
    times = times_decoded(plan)
    if stays_packed(plan.residuals, plan.code):
        yield "residuals of linear layers packed"
    elif times > 1:
        packed = held_bytes(replace(plan, residuals="packed"))
        instead = f"; with --residuals packed {size(packed)}" if packed < needs.bundle else ""
        yield f"residuals decoded, {times:.1f} times what they take in files{instead}"
    asked, each = plan.work.context or 0, needs.bundle_tokens // plan.work.requests
    if 0 < each < asked:
        yield f"the model reads {each} tokens at most, not {asked}"


def _print_change(needs: Footprint, change: Change | None) -> None:
    """Whether it fits, and the cheapest change with which it does."""
    from .console import out, say, size, tell

    if needs.limit is None:
        return
    if needs.fits:
        say(f"fits         yes, with room for {needs.room} tokens of cache")
    elif change is None:
        out.print("[red]fits         no, and no choice of base, tables, code and rate makes it fit[/]:")
        elsewhere = ", or a thinker elsewhere (an endpoint)" if needs.thinker else ""
        tell(f"             fewer experts or tokens{elsewhere}; there is room for {needs.room} tokens", 13)
    else:
        say(f"fits         no; with {', '.join(change.words)} it does: {size(change.needs.total)}")
