"""What every section of the report is made of: headings, tables, plots, and numbers in words.

Knows plotly and HTML; knows nothing of what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ..errors import MissingExtraError, install_line

# One sober palette for every plot (Okabe and Ito's, told apart by colour-blind readers too).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")

STYLE = """
:root { color-scheme: light; --ink: #1d2430; --soft: #5d6b7e; --line: #e3e8ef; --card: #f6f8fb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 32px 20px 64px; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 28px; margin: 0; } h2 { font-size: 20px; margin: 44px 0 8px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 80ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 24px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 24px; line-height: 1.25; } .card span { color: var(--soft); font-size: 14px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { text-align: right; padding: 7px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td.source { text-align: left; max-width: 340px; overflow: hidden; text-overflow: ellipsis; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; }
footer { margin-top: 48px; color: var(--soft); font-size: 14px; }
"""


def html_page(title: str, body: str, footer: str) -> str:
    """A whole page that needs no network. `title` and `footer` are text, `body` is HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    _, plotly_js = plotly()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: polymerge report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f"<script>{plotly_js}</script></head><body><h1>{escape(title)}</h1>{body}"
        f"<footer>{escape(footer)}</footer></body></html>\n"
    )


def cards(values: Sequence[tuple[str, str]]) -> str:
    """A row of cards: a value and what it is."""
    inside = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in values
    )
    return f'<div class="cards">{inside}</div>'


def section(title: str, text: str, content: str) -> str:
    """A heading, a sentence and what it is about. `content` is HTML already."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, last_is_source: bool = False) -> str:
    """A table of texts, which are escaped here."""

    def cell(value: str, last: bool) -> str:
        mark = f' class="source" title="{escape(value)}"' if last and last_is_source else ""
        return f"<td{mark}>{escape(value)}</td>"

    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(cell(v, i == len(row) - 1) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(figure: Any, height: int) -> str:
    """A plotly figure as HTML, in the report's look."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 36, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1d2430"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}
    )
    return html


def plotly() -> tuple[Any, str]:
    """plotly's graph objects and its script.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError(f"the HTML report needs plotly; {install_line('report')}") from None
    return go, get_plotlyjs()


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
