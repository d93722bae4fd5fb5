"""`polymerge router fit`, `eval` and `feedback`: the router's life before it routes."""

from __future__ import annotations

import typer

from .router_eval import evaluate
from .router_feedback import feedback
from .router_fit import fit

router = typer.Typer(no_args_is_help=True, help="Fit a bundle's router and measure it.")
router.command("fit")(fit)
router.command("eval")(evaluate)
router.command("feedback")(feedback)
