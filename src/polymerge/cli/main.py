"""The `polymerge` command: its verbs, and how an error becomes one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..errors import PolymergeError
from ..version import __version__
from .add import add
from .assess import assess
from .compete import compete
from .console import err, tell
from .demo import demo
from .eval import eval
from .export import export
from .generate import generate
from .inspect import inspect
from .interrupted import STOPPED
from .merge import merge
from .plan import plan
from .pull import pull
from .push import push
from .quantize import quantize
from .remove import remove
from .route import route
from .router import router
from .search import search
from .serve import serve
from .stages import stages
from .sweep import sweep
from .upgrade import upgrade
from .verify import verify

app = typer.Typer(
    help="Merge fine-tuned language models into one bundle that keeps what each of them can do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS: dict[str, list[Callable[..., None]]] = {
    "The bundle": [demo, plan, merge, inspect, verify, add, remove, upgrade, quantize, export, push, pull],
    "Answers": [generate, route, stages, serve],
    "Measuring": [assess, eval, compete, sweep, search],
}
for panel, verbs in VERBS.items():
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)
app.add_typer(router, name="router", rich_help_panel="Answers")


def _version(asked: bool) -> None:
    if asked:
        print(f"polymerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command. A user's mistake is one line on standard error, never a traceback."""
    # transformers prints advice and progress bars of its own; the command line has its own words
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except KeyboardInterrupt:  # before a verb had begun
        print("interrupted", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except PolymergeError as error:
        tell(f"polymerge: {error}", to=err)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output (head, less) has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        tell(f"polymerge: {error.filename or 'the disk'}: {error.strerror or error}", to=err)
        raise SystemExit(2) from None
