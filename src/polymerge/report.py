"""The bundle's HTML report: one file with tables and plots that needs no network.

Knows how to draw; every number comes from `polymerge.inspection`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .errors import MissingExtraError
from .inspection import Inspection, inspect_bundle, layer_number, module_kind
from .staging import write_bytes

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


def write_report(bundle: Bundle | str | Path, path: str | Path, *, demo: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Writes the report.

    Args:
        demo: rows of a demo (`polymerge.demo.run.SkillRow` as dicts), shown first.

    Raises:
        BundleError: not a bundle. MissingExtraError: plotly is not installed.
    """
    bundle, path = Bundle.open(bundle), Path(path)
    found = inspect_bundle(bundle)
    stats = bundle.stats()
    sections = [_demo_table(demo)] if demo else []
    sections += [_sizes(found), _experts(found)]
    if stats:
        sections += [_errors(stats), _energy(stats), _ranks(stats), _worst(found)]
    write_bytes(path, _page(bundle, found, sections).encode())
    return path


def _page(bundle: Bundle, found: Inspection, sections: Sequence[str]) -> str:
    _, plotly_js = _plotly()
    cards = [
        (_size(found.total_bytes), f"for {len(found.experts)} experts"),
        (f"{found.share_of_one_model:.2f} ×", f"one model; apart they are {_size(found.separate_bytes)}"),
        (f"{found.energy_kept:.1%}", "of the residuals' energy kept"),
        (f"{found.compress_rate:g}", f"compress rate, rank {found.rank_range[0]} to {found.rank_range[1]}"),
        (found.scale.replace("_", " "), "scale"),
    ]
    card_html = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in cards
    )
    notes = "".join(f"<p>Note: {escape(note)}</p>" for note in found.notes)
    name = escape(bundle.path.resolve().name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}: polymerge report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f"<script>{plotly_js}</script></head><body><h1>{name}</h1>"
        f"<p>{len(found.experts)} experts of {escape(found.architecture)}, stored in {escape(found.dtype)}.</p>"
        f'<div class="cards">{card_html}</div>{notes}{"".join(sections)}'
        f"<footer>polymerge {escape(bundle.manifest.polymerge_version)}, bundle {bundle.digest[:16]}</footer>"
        "</body></html>\n"
    )


def _demo_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "skill",
        "examples",
        "original expert",
        "plain average",
        "bundle, right expert",
        "kept",
        "KL average",
        "KL bundle",
    )
    body = [
        (
            row["skill"],
            str(row["examples"]),
            f"{row['original']:.1%}",
            f"{row['average']:.1%}",
            f"{row['bundle']:.1%}",
            f"{row['kept']:.1%}",
            f"{row['kl_average']:.4f}",
            f"{row['kl_bundle']:.4f}",
        )
        for row in rows
    ]
    text = (
        "Exact match on held-out requests. KL is from the original expert's next-token distribution, in nats a token."
    )
    return _section("What the experts keep", text, _table(head, body))


def _sizes(found: Inspection) -> str:
    go, _ = _plotly()
    residuals = sum(e.residual_bytes for e in found.experts)
    own = sum(e.bytes for e in found.experts) - residuals
    figure = go.Figure()
    labels = ["separate models", "one model", "this bundle"]
    one = found.base_bytes
    parts = {
        "whole models": [found.separate_bytes, one, 0],
        "average": [0, 0, one],
        "residuals": [0, 0, residuals],
        "experts' own tensors": [0, 0, own],
    }
    for (part, values), colour in zip(parts.items(), ("#b9c2cf", *COLOURS), strict=False):
        texts = [_size(v) if v else "" for v in values]
        figure.add_bar(
            y=labels,
            x=[v / 1e6 for v in values],
            name=part,
            orientation="h",
            marker_color=colour,
            customdata=texts,
            hovertemplate="%{customdata}<extra>" + part + "</extra>",
        )
    figure.update_layout(barmode="stack", xaxis_title="MB", yaxis={"autorange": "reversed"})
    return _section(
        "Size", "Bytes of weights on disk, which is also what a loaded bundle holds in memory.", _plot(figure, 260)
    )


def _experts(found: Inspection) -> str:
    head = (
        "expert",
        "size",
        "own tensors",
        "scale ratio",
        "energy kept",
        "error",
        "error of the average alone",
        "source",
    )
    rows = [
        (
            e.name,
            _size(e.bytes),
            str(e.own_tensors),
            f"1 ± {max(abs(ratio - 1) for ratio in e.scale_ratio_range):.1g}",
            f"{e.energy_kept:.1%}",
            f"{e.relative_error:.2g}",
            f"{e.lost_by_averaging:.2g}",
            e.source,
        )
        for e in found.experts
    ]
    text = "Errors are relative Frobenius norms over all compressed tensors of an expert."
    return _section("Experts", text, _table(head, rows, last_is_source=True))


def _errors(stats: Sequence[Mapping[str, Any]]) -> str:
    """Per layer, what averaging loses and what is left after the residuals."""
    go, _ = _plotly()
    figure = go.Figure()
    experts = list(dict.fromkeys(line["expert"] for line in stats))
    for expert, colour in zip(experts, COLOURS * len(experts), strict=False):
        lines = [line for line in stats if line["expert"] == expert]
        numbers = sorted({layer_number(line["module"]) for line in lines})
        for key, dash, label in (("residual_norm", "dot", "average alone"), ("relative_error", "solid", "bundle")):
            means = [_mean([x[key] for x in lines if layer_number(x["module"]) == n]) for n in numbers]
            figure.add_scatter(
                x=numbers,
                y=means,
                name=f"{expert}, {label}",
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                marker={"size": 5},
            )
    figure.update_layout(xaxis_title="layer", yaxis_title="relative error", yaxis={"rangemode": "tozero"})
    text = "Mean relative error of a layer's weights: dotted with nothing but the average, solid with the residual."
    return _section("Error by layer", text, _plot(figure, 380))


def _energy(stats: Sequence[Mapping[str, Any]]) -> str:
    """A heatmap of layer by module kind for every expert."""
    go, _ = _plotly()
    kinds = sorted({module_kind(line["module"]) for line in stats})
    numbers = sorted({layer_number(line["module"]) for line in stats})
    plots = []
    for expert in dict.fromkeys(line["expert"] for line in stats):
        cells: dict[tuple[str, int], list[float]] = {}
        for line in (line for line in stats if line["expert"] == expert):
            cells.setdefault((module_kind(line["module"]), layer_number(line["module"])), []).append(
                line["energy_kept"]
            )
        grid = [[_mean(cells.get((kind, n), [])) for n in numbers] for kind in kinds]
        figure = go.Figure(
            go.Heatmap(
                z=grid,
                x=numbers,
                y=kinds,
                zmin=0,
                zmax=1,
                colorscale="Viridis",
                colorbar={"tickformat": ".0%", "title": "kept"},
                hovertemplate="layer %{x}, %{y}: %{z:.1%}<extra></extra>",
            )
        )
        figure.update_layout(title={"text": escape(expert), "font": {"size": 15}}, xaxis_title="layer")
        plots.append(_plot(figure, 150 + 26 * len(kinds)))
    text = "Share of a residual's squared norm that its factors keep. A higher rank would help most where it is dark."
    return _section("Energy kept by layer and kind of module", text, "".join(plots))


def _ranks(stats: Sequence[Mapping[str, Any]]) -> str:
    go, _ = _plotly()
    by_kind: dict[str, dict[str, Any]] = {}
    for line in stats:
        by_kind.setdefault(module_kind(line["module"]), dict(line))
    kinds = sorted(by_kind)
    figure = go.Figure(
        go.Bar(
            x=kinds,
            y=[by_kind[kind]["rank"] for kind in kinds],
            marker_color=COLOURS[0],
            customdata=["{} x {}".format(*by_kind[kind]["shape"]) for kind in kinds],
            hovertemplate="%{x} (%{customdata}): rank %{y}<extra></extra>",
        )
    )
    figure.update_layout(yaxis_title="rank")
    text = "Rank 0 means that the experts' matrices are kept whole, or that the average alone is."
    return _section("Rank by kind of module", text, _plot(figure, 300))


def _worst(found: Inspection) -> str:
    head = ("tensor", "expert", "shape", "rank", "error", "energy kept")
    rows = [
        (
            line["tensor"],
            line["expert"],
            "{} x {}".format(*line["shape"]),
            str(line["rank"]),
            f"{line['relative_error']:.3g}",
            f"{line['energy_kept']:.1%}",
        )
        for line in found.worst
    ]
    return _section("Tensors that lost most", "By relative error of the rebuilt weight.", _table(head, rows))


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, last_is_source: bool = False) -> str:
    def cell(value: str, last: bool) -> str:
        mark = f' class="source" title="{escape(value)}"' if last and last_is_source else ""
        return f"<td{mark}>{escape(value)}</td>"

    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(cell(v, i == len(row) - 1) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _plot(figure: Any, height: int) -> str:
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


def _plotly() -> tuple[Any, str]:
    try:
        import plotly.graph_objects as go
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError("the HTML report needs plotly; run `pip install polymerge[report]`") from None
    return go, get_plotlyjs()


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
