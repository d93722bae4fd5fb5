"""`polymerge add`: one more expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..merging.grow import Added


def add(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    expert: Annotated[str, typer.Argument(metavar="NAME=SOURCE", help="NAME=SOURCE of the new expert.")],
    base: Annotated[str | None, typer.Option(help="The model under a PEFT adapter.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="JSONL file of its requests: what counts for them is kept first.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the source's own modelling code run.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Add an expert against the average as it stands; the other experts are neither read nor changed."""
    from ..search.add import add_expert
    from .console import err, print_json
    from .interrupted import whole_or_not
    from .logs import hush_libraries
    from .progress import progress_bar
    from .words import read_pairs

    if calibration:
        hush_libraries()
    [(name, source)] = read_pairs([expert]).items()
    with progress_bar(f"adding {name}", quiet or as_json) as show, whole_or_not(bundle, name, adding=True):
        added = add_expert(
            bundle, name, source, base=base, calibration=calibration, device=device,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total, tensor: show(done, total),
        )  # fmt: skip
    if added.persona and not quiet:
        err.print(f"{name} has its own {', '.join(added.persona)}", markup=False)
    if added.note and not quiet:
        err.print(added.note, markup=False)
    if as_json:
        print_json(_data(added, name))
    elif not quiet:
        _print(added, name, bundle)


def _data(added: Added, name: str) -> dict[str, Any]:
    return {
        "expert": name,
        "bytes": added.bundle.sizes().experts[name],
        "relative_error": added.relative_error,
        "fresh_relative_error": added.fresh_relative_error,
        "scale_ratio_range": added.scale_ratio_range,
        "persona": added.persona,
        "note": added.note,
    }


def _print(added: Added, name: str, bundle: Path) -> None:
    from .console import size, tell

    sizes, now, fresh = added.bundle.sizes(), added.relative_error, added.fresh_relative_error
    tell(f"{bundle}: {name} added, {size(sizes.experts[name])} ({size(sizes.total)} in all)")
    gain = 1 - fresh / now if now else 0.0
    tell(
        f"its weights are {now:.3g} from the checkpoint (relative, mean over sampled layers); a fresh merge of all "
        f"{len(sizes.experts)} would give about {fresh:.3g}, {abs(gain):.0%} {'less' if gain >= 0 else 'more'}"
    )
