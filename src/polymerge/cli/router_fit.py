"""`polymerge router fit`: learn from labelled samples which expert answers what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fit(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    data: Annotated[
        Path, typer.Option(help="Folder with NAME/train.jsonl and NAME/validation.jsonl; NAME is a field.")
    ],
    fields: Annotated[str | None, typer.Option(help="Which fields, separated by commas; by default all.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples of a field and split, at most.")] = 256,
    classifier: Annotated[str, typer.Option(help="logistic, centroid or knn.")] = "logistic",
    template: Annotated[
        str | None, typer.Option(help="Alignment prompt with {input}; or published, task, none.")
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
    coverage: Annotated[float, typer.Option(help="Share of known requests that stay over the threshold.")] = 0.96,
    accuracy: Annotated[float | None, typer.Option(help="Instead, share of right fields wanted over it.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws for the learning curve.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit the bundle's router and say how good it is, and how many samples it takes."""
    from ..router.settings import fit_settings
    from ..router.training import fit_bundle
    from .console import hush_libraries, print_json, progress_bar
    from .routing import open_engine, print_fit
    from .verify import named_sources

    given = {"template": template, "layers": layers, "pooling": pooling, "classifier": classifier}
    settings = fit_settings(**given, fallback=fallback, coverage=coverage, accuracy=accuracy, seed=seed)
    hush_libraries()
    own = open_engine(bundle, None, device) if self_label or embed_with is None else None
    with progress_bar("embedding", quiet or as_json) as show:
        fitted = fit_bundle(
            bundle,
            own if own is not None and embed_with is None else open_engine(bundle, embed_with, device),
            data,
            settings=settings,
            fields=fields.split(",") if fields else None,
            samples=samples,
            table=table,
            experts=named_sources(assign or []),
            label_with=own if self_label else None,
            chat=chat,
            model=embed_with,
            progress=show,
        )
    if as_json:
        print_json({name: value for name, value in fitted.report.items() if name != "picture"})
    elif not quiet:
        print_fit(bundle, fitted)
