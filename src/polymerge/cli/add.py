"""`polymerge add`: one more expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    expert: Annotated[str, typer.Argument(help="NAME=SOURCE of the new expert.")],
    base: Annotated[str | None, typer.Option(help="The model under a PEFT adapter.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Add an expert against the average as it stands; the other experts are neither read nor changed."""
    from rich.progress import Progress

    from ..merging.grow import add_expert
    from ..recipe.merge import Source
    from .console import err, out, print_json, size
    from .verify import named_sources

    [(name, source)] = named_sources([expert]).items()
    with Progress(console=err, transient=True, disable=quiet or as_json) as bar:
        task = bar.add_task(f"adding {name}")

        def show(done: int, total: int, tensor: str) -> None:
            bar.update(task, completed=done, total=total)

        added = add_expert(bundle, name, Source(source=source, base=base), device=device, progress=show)
    if not quiet:
        for note in added.notes:
            err.print(f"note: {note}", markup=False)
    sizes = added.bundle.sizes()
    now, fresh = added.relative_error, added.fresh_relative_error
    if as_json:
        print_json(
            {
                "expert": name,
                "bytes": sizes.experts[name],
                "relative_error": now,
                "fresh_relative_error": fresh,
                "scale_ratio_range": added.scale_ratio_range,
                "notes": added.notes,
            }
        )
    elif not quiet:
        out.print(f"{bundle}: {name} added, {size(sizes.experts[name])} ({size(sizes.total)} in all)", markup=False)
        gain = 1 - fresh / now if now else 0.0
        out.print(
            f"its weights are {now:.3g} from the checkpoint (relative, mean over sampled layers); a fresh merge of all "
            f"{len(sizes.experts)} would give about {fresh:.3g}, {abs(gain):.0%} {'less' if gain >= 0 else 'more'}"
        )
