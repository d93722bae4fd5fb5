"""`polymerge inspect`: what a bundle holds and what the merge lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    html: Annotated[
        Path | None, typer.Option(help="Write a page of words and plots; its script lies beside it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Summarise a bundle: sizes, ranks, energy kept, the tensors that lost most."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from ..bundle.inspect import inspect_bundle
    from ..recipe.rates import in_words as rate_in_words
    from ..sources.persona import in_words
    from .console import out, print_json, say, size, tell
    from .verdicts import print_verdicts

    inspection = inspect_bundle(bundle)
    if html is not None:
        from ..report import write_report

        html = write_report(bundle, html)
    if as_json:
        print_json(inspection.to_json())
        return
    tell(f"{bundle}: {len(inspection.experts)} experts of {inspection.architecture}, {inspection.dtype}")
    tell(
        f"size         {size(inspection.total_bytes)}, {inspection.share_of_one_model:.2f} times one model "
        f"({size(inspection.separate_bytes)} apart)",
        13,
    )
    ranks = f"rank {inspection.rank_range[0]} to {inspection.rank_range[1]}"
    rate = escape(rate_in_words(inspection.compress_rate))
    out.print(f"compressed   rate {rate}, {ranks}, code {inspection.code}, scale {inspection.scale}")
    if inspection.base_code != inspection.dtype:
        out.print(f"base         linear layers stored in {inspection.base_code}")
    storage = ", ".join(f"{n} {kind}" for kind, n in inspection.storage.items())
    tell(f"tensors      {inspection.tensors}; linear: {storage}", 13)
    kinds = ", ".join(f"{kind}\N{NO-BREAK SPACE}{share:.0%}" for kind, share in inspection.energy_by_kind.items())
    tell(f"energy kept  {inspection.energy_kept:.1%} of the residuals ({kinds})", 13)
    # Units stay together in a terminal of 80 columns; a source is a line of its own.
    experts = Table(box=SIMPLE_HEAD)
    experts.add_column("expert", overflow="fold", min_width=8)
    for column in ("size", "own tensors", "ratio", "kept", "error", "average's"):
        experts.add_column(column, justify="right", no_wrap=True)
    for e in inspection.experts:
        low, high = e.scale_ratio_range
        experts.add_row(
            escape(e.name),
            size(e.bytes),
            str(e.own_tensors),
            f"1 ± {max(abs(low - 1), abs(high - 1)):.1g}",
            f"{e.energy_kept:.1%}",
            f"{e.relative_error:.2g}",
            f"{e.lost_by_averaging:.2g}",
        )
    out.print(experts)
    for e in inspection.experts:
        say(f"{e.name}: from {e.source}")
    for e in inspection.experts:
        for lender, tensors in e.shared.items():
            tell(f"{e.name}: {tensors} of its tensors lie in {lender}'s file, as both have them in common")
    print_verdicts(inspection)
    for e in (e for e in inspection.experts if e.persona):
        tell(f"{e.name} has its own {in_words(e.persona)}")
    for e in (e for e in inspection.experts if e.aligned):
        before, after = e.aligned or (0.0, 0.0)
        tell(f"{e.name} was {before:.2g} from what it was aligned to, and is {after:.2g} from it")
    worst = Table(box=SIMPLE_HEAD)
    worst.add_column("tensors that lost most", overflow="fold")
    worst.add_column("expert", overflow="fold")
    for column in ("rank", "error", "kept"):
        worst.add_column(column, justify="right", no_wrap=True)
    for line in inspection.worst:
        worst.add_row(
            escape(line["tensor"]),
            escape(line["expert"]),
            str(line["rank"]),
            f"{line['relative_error']:.2g}",
            f"{line['energy_kept']:.1%}",
        )
    out.print(worst)
    for note in inspection.notes:
        tell(f"note: {note}")
    if html is not None:
        say(f"report: {html}")
