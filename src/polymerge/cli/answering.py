"""How answers and the evidence of `polymerge stages` are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from .console import err, out

if TYPE_CHECKING:
    from ..router.route import Route
    from ..staged import Evidence, Response
    from ..staged.asking import AskingEvidence


def tell_route(route: Route) -> None:
    """The router's choice, to standard error."""
    err.print(f"[dim]expert {escape(str(route.expert or 'average'))}: {escape(route.reason)}[/]", soft_wrap=True)


def print_response(response: Response, show_thoughts: bool) -> None:
    """The answer to standard output; the thought, if asked for, and why there is none to standard error."""
    if show_thoughts or response.stage == "direct":
        err.print(f"{response.stage}: {response.reason}", style="dim", markup=False, soft_wrap=True)
    if show_thoughts and response.thought:
        err.print(response.thought, style="dim", markup=False, soft_wrap=True)
    out.print(response.text, markup=False, soft_wrap=True)


def print_evidence(evidence: Evidence) -> None:
    """The ablation: one line a field, one column a way of answering."""
    if evidence.fields:
        print_thinking(evidence)
    if evidence.forms:
        print_forms(evidence)
    if evidence.asking:
        print_asking(evidence.asking)


def print_thinking(evidence: Evidence) -> None:
    """Direct answers and both versions of the prompts."""
    table = Table(title=f"mean score on validation rows, thinker {evidence.thinker}")
    for column in ("field", "rows", "direct", "v1", "v2", "auto", "auto takes"):
        table.add_column(column, justify="left" if column in ("field", "auto takes") else "right")
    for name, field in evidence.fields.items():
        shown = [f"{field.scores[way]:.3f}" for way in ("direct", "v1", "v2", field.best)]
        table.add_row(name, str(field.rows), *shown, field.best)
    out.print(table)


def print_asking(asking: AskingEvidence) -> None:
    """The ways of asking: one line a way, one column a field, the way that `auto` takes marked."""
    names = {area: area or "all" for area in asking.fields}
    table = Table("asked", *names.values(), title="mean score of direct answers (* is what auto takes)")
    for way in next(iter(asking.fields.values())).scores:
        shown = [f"{field.scores[way]:.3f}{'*' if field.best == way else ' '}" for field in asking.fields.values()]
        table.add_row(escape(way), *shown)
    out.print(table)


def print_forms(evidence: Evidence) -> None:
    """Answers of a form: one line a field, the share that has the form and the share that is right by way."""
    ways = list(dict.fromkeys(way for scores in evidence.forms.values() for way in scores))
    table = Table("field", "rows", *ways, title="answers that have their form / that are right")
    for name, scores in evidence.forms.items():
        shown = [f"{scores[way].valid:.0%} / {scores[way].right:.1%}" if way in scores else "-" for way in ways]
        table.add_row(escape(name), str(max((score.rows for score in scores.values()), default=0)), *shown)
    out.print(table)
