"""`polymerge remove`: one expert less."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def remove(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    name: Annotated[str, typer.Argument(help="The expert's name.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Take an expert out; the average and the other experts stay as they are to the bit."""
    from ..merging.grow import remove_expert
    from .console import tell
    from .interrupted import whole_or_not

    with whole_or_not(bundle, name, adding=False):
        left = remove_expert(bundle, name)
    if not quiet:
        tell(f"{bundle}: {name} removed; left: {', '.join(left.experts)}")
