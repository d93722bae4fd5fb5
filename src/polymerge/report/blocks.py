"""What every section of the report is made of: headings, tables, plots, folds, and numbers in words.

Knows plotly and HTML; knows nothing of what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..bundle.files import write_bytes
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
.verdicts { list-style: none; margin: 16px 0; padding: 0; } .verdicts li { margin: 8px 0; padding-left: 14px;
       border-left: 4px solid var(--line); } .verdicts b { margin-right: 6px; }
.verdicts .good { border-color: #009E73; } .verdicts .near { border-color: #E69F00; }
.verdicts .bad { border-color: #D55E00; } .verdicts span { color: var(--soft); }
details { border-top: 1px solid var(--line); } details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: 12px 0; font-weight: 600; } details h2 { font-size: 16px; margin: 8px 0; }
.fold { padding-bottom: 16px; } .missing { color: #a33b00; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; }
footer { margin-top: 48px; color: var(--soft); font-size: 14px; }
"""


# A plot in a closed fold has no width until the fold is opened.
RESIZE = """
for (const fold of document.querySelectorAll("details"))
  fold.addEventListener("toggle", () => {
    if (fold.open && window.Plotly)
      for (const plot of fold.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(plot);
  });
"""


def write_page(path: str | Path, title: str, body: str, footer: str) -> Path:
    """A page and, beside it, the one script that all pages of its folder draw their plots with; no network is asked.

    Args:
        title, footer: text. body: HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    path, script = Path(path), script_name()
    beside = path.with_name(script)
    if not beside.exists():
        from plotly.offline import get_plotlyjs

        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(beside, get_plotlyjs().encode())
    write_bytes(path, html_page(title, body, footer, script).encode())
    return path


def script_name() -> str:
    """Of the script beside a page. Raises MissingExtraError."""
    plotly()
    from plotly import __version__

    return f"plotly-{__version__}.min.js"


def html_page(title: str, body: str, footer: str, script: str) -> str:
    """A whole page, whose script lies beside it; without that, it says so and has its words and tables."""
    said = f"The plots need the file {script} beside this page."
    missing = f"document.documentElement.dataset.plots = {said!r}"
    tell = (
        "const lost = document.documentElement.dataset.plots; if (lost) { const line = document.createElement('p');"
        "line.className = 'missing'; line.textContent = lost; document.querySelector('h1').after(line); "
        "window.Plotly = { newPlot() {} }; }"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: polymerge report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f'<script src="{escape(script)}" onerror="{escape(missing)}"></script></head>'
        f"<body><main><h1>{escape(title)}</h1><script>{tell}</script>{body}</main>"
        f"<footer>{escape(footer)}</footer><script>{RESIZE}</script></body></html>\n"
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


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def fold(title: str, content: str) -> str:
    """What is there for those who ask. `content` is HTML already."""
    return f'<details><summary>{escape(title)}</summary><div class="fold">{content}</div></details>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, last_is_source: bool = False) -> str:
    """A table of texts, which are escaped here."""

    def cell(value: str, last: bool) -> str:
        mark = f' class="source" title="{escape(value)}"' if last and last_is_source else ""
        return f"<td{mark}>{escape(value)}</td>"

    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(cell(v, i == len(row) - 1) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(figure: Any, height: int) -> str:
    """A plotly figure as HTML, in the report's look. Without its toolbar, which lies over legends: a plot is zoomed
    by dragging and brought back by a double click."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 36, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1d2430"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return html


def plotly() -> Any:
    """plotly's graph objects.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MissingExtraError(f"the HTML report needs plotly; {install_line('report')}") from None
    return go


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
