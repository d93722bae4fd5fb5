"""What `polymerge generate --staged` does, and how responses and the evidence of `polymerge stages` are printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..errors import PolymergeError
from .console import err, out, print_json

if TYPE_CHECKING:
    from ..staged import Evidence, Response


def answer_staged(
    bundle: Path,
    prompt: str,
    *,
    choices: list[str],
    max_new_tokens: int,
    temperature: float,
    low_memory: bool,
    show_thoughts: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Thinks, answers and prints. The options are those of `open_pipeline`."""
    from ..staged import Question
    from ..staged.opening import open_pipeline

    if temperature > 0:
        raise PolymergeError("generate: --staged answers greedily; leave --temperature out")
    pipeline = open_pipeline(bundle, low_memory=low_memory, **options)
    response = pipeline.respond([Question(prompt, tuple(choices), max_new_tokens)])[0]
    if as_json:
        print_json({"prompt": prompt} | response.to_json())
    else:
        print_response(response, show_thoughts)


def refuse_without_staged(**options: Any) -> None:
    """An option that would be ignored is said so."""
    given = next((name for name, value in options.items() if value), None)
    if given:
        raise PolymergeError(f"generate: --{given.replace('_', '-')} needs --staged")


def print_response(response: Response, show_thoughts: bool) -> None:
    """The answer to standard output; the thought, if asked for, and why there is none to standard error."""
    if show_thoughts or response.stage == "direct":
        err.print(f"{response.stage}: {response.reason}", style="dim", markup=False, soft_wrap=True)
    if show_thoughts and response.thought:
        err.print(response.thought, style="dim", markup=False, soft_wrap=True)
    out.print(response.text, markup=False, soft_wrap=True)


def print_evidence(found: Evidence) -> None:
    """The ablation: one line a field, one column a way of answering."""
    table = Table(title=f"mean score on validation rows, thinker {found.thinker}")
    for column in ("field", "rows", "direct", "v1", "v2", "auto", "auto takes"):
        table.add_column(column, justify="left" if column in ("field", "auto takes") else "right")
    for name, own in found.fields.items():
        shown = [f"{own.scores[way]:.3f}" for way in ("direct", "v1", "v2", own.best)]
        table.add_row(name, str(own.rows), *shown, own.best)
    out.print(table)
