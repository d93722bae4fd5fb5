"""`polymerge inspect`: what a bundle holds and what the merge lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page with plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Summarise a bundle: sizes, ranks, energy kept, the tensors that lost most."""
    from rich.markup import escape
    from rich.table import Table

    from ..bundle.inspect import inspect_bundle
    from ..recipe.rates import in_words
    from .console import out, print_json, size
    from .verdicts import print_verdicts

    inspection = inspect_bundle(bundle)
    if html is not None:
        from ..report import write_report

        write_report(bundle, html)
    if as_json:
        print_json(inspection.to_json())
        return
    out.print(f"[bold]{bundle}[/]: {len(inspection.experts)} experts of {inspection.architecture}, {inspection.dtype}")
    out.print(
        f"size         {size(inspection.total_bytes)}, {inspection.share_of_one_model:.2f} times one model "
        f"({size(inspection.separate_bytes)} apart)"
    )
    ranks = f"rank {inspection.rank_range[0]} to {inspection.rank_range[1]}"
    rate = escape(in_words(inspection.compress_rate))
    out.print(f"compressed   rate {rate}, {ranks}, code {inspection.code}, scale {inspection.scale}")
    if inspection.base_code != inspection.dtype:
        out.print(f"base         linear layers stored in {inspection.base_code}")
    storage = ", ".join(f"{n} {kind}" for kind, n in inspection.storage.items())
    out.print(f"tensors      {inspection.tensors}; linear: {storage}")
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in inspection.energy_by_kind.items())
    out.print(f"energy kept  {inspection.energy_kept:.1%} of the residuals ({kinds})", soft_wrap=True)
    experts = Table(
        "expert", "size", "own tensors", "scale ratio", "energy kept", "error", "error of the average", "source"
    )
    for e in inspection.experts:
        low, high = e.scale_ratio_range
        experts.add_row(
            e.name,
            size(e.bytes),
            str(e.own_tensors),
            f"1 ± {max(abs(low - 1), abs(high - 1)):.1g}",
            f"{e.energy_kept:.1%}",
            f"{e.relative_error:.2g}",
            f"{e.lost_by_averaging:.2g}",
            e.source,
        )
    out.print(experts)
    print_verdicts(inspection)
    for e in (e for e in inspection.experts if e.persona):
        out.print(f"{e.name} has its own {', '.join(e.persona)}", markup=False)
    for e in (e for e in inspection.experts if e.aligned):
        before, after = e.aligned or (0.0, 0.0)
        out.print(f"{e.name} was {before:.2g} from what it was aligned to, and is {after:.2g} from it", markup=False)
    worst = Table("tensors that lost most", "expert", "rank", "error", "energy kept")
    for line in inspection.worst:
        worst.add_row(
            line["tensor"],
            line["expert"],
            str(line["rank"]),
            f"{line['relative_error']:.2g}",
            f"{line['energy_kept']:.1%}",
        )
    out.print(worst)
    for note in inspection.notes:
        out.print(f"note: {note}", markup=False)
    if html is not None:
        out.print(f"report: {html}", markup=False)
