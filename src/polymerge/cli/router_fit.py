"""`polymerge router fit`: learn from labelled samples which expert answers what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fit(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder with NAME/train.jsonl and NAME/validation.jsonl; NAME is a field.")
    ] = None,
    describe: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=WORDS that say what it is about; without data and words, the experts' names."),
    ] = None,
    fields: Annotated[str | None, typer.Option(help="Which fields, separated by commas; by default all.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples of a field and split, at most.")] = 256,
    classifier: Annotated[
        str | None, typer.Option(help="logistic, centroid or knn; by default logistic, without labels centroid.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Alignment prompt with {input}; or published, task (with few samples), none."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Hidden states to read, separated by commas; -1 is the last.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="last (token) or mean (of all tokens).")] = None,
    embed_with: Annotated[str | None, typer.Option(help="Another model to embed with, named as in a recipe.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Assessment table; by default the one in the bundle, if there is one.")
    ] = None,
    assign: Annotated[list[str] | None, typer.Option(help="FIELD=EXPERT, before the table.")] = None,
    self_label: Annotated[
        bool, typer.Option("--self-label", help="Label a row by the expert that finds its `answer` likeliest.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Label through the chat template.")] = True,
    fallback: Annotated[str, typer.Option(help="Under the threshold: average, an expert, or mixture.")] = "average",
    coverage: Annotated[
        float | None, typer.Option(help="Share of known requests over the threshold, whatever a mistake costs.")
    ] = None,
    accuracy: Annotated[float | None, typer.Option(help="Instead, share of right fields wanted over it.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws for the learning curve.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit the bundle's router and say how good it is, and how many samples it takes."""
    from ..router.training import fit_router
    from .console import print_json
    from .logs import hush_libraries
    from .progress import progress_bar
    from .routing import print_fit
    from .words import read_list, read_numbers, read_pairs

    hush_libraries()
    numbers = [int(number) for number in read_numbers(layers, "--layers")] if layers else None
    with progress_bar("reading", quiet or as_json) as show:
        fitted = fit_router(
            bundle, data, describe=read_pairs(describe, "FIELD=WORDS"), fields=read_list(fields), samples=samples,
            classifier=classifier, template=template,
            layers=numbers, pooling=pooling, embed_with=embed_with, table=table,
            assign=read_pairs(assign, "FIELD=EXPERT"), self_label=self_label, chat=chat, fallback=fallback,
            coverage=coverage, accuracy=accuracy, seed=seed, device=device, progress=show,
        )  # fmt: skip
    if as_json:
        print_json({name: value for name, value in fitted.report.items() if name != "picture"})
    elif not quiet:
        print_fit(bundle, fitted)
