"""The report's part on the router: who is taken for whom, how sure it is, and where the samples lie.

Knows how to draw; every number comes from what `polymerge router fit` and `router eval` wrote into the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..router.evaluation import EVALUATION
from ..router.record import router_folder
from ..router.training import FIT_REPORT
from .blocks import COLOURS, plot, plotly, section


def router_sections(bundle: Path) -> list[str]:
    """The sections of a bundle's folder: none without a router, fewer where it was not evaluated."""
    folder = router_folder(bundle)
    fitted, measured = _read(folder / FIT_REPORT), _read(folder / EVALUATION)
    sections = []
    if fitted.get("learning_curve"):
        sections.append(_learning_curve(fitted))
    if measured:
        sections.append(_confusion(measured))
        sections.append(_reliability(measured))
        sections.append(_coverage(measured))
    points = measured.get("picture") or fitted.get("picture")
    if points:
        sections.append(_picture(points))
    return sections


def _read(file: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is missing or damaged: a report is drawn from what there is."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _learning_curve(fitted: Mapping[str, Any]) -> str:
    go = plotly()
    curve = fitted["learning_curve"]
    figure = go.Figure()
    figure.add_scatter(
        x=[point["samples"] for point in curve],
        y=[point["accuracy"] for point in curve],
        mode="lines+markers",
        line={"color": COLOURS[0]},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [point["highest"] - point["accuracy"] for point in curve],
            "arrayminus": [point["accuracy"] - point["lowest"] for point in curve],
        },
        showlegend=False,
    )
    figure.update_layout(
        xaxis={"title": "training samples a field", "type": "log"}, yaxis={"title": "accuracy", "tickformat": ".0%"}
    )
    text = "Routing accuracy on the validation samples; the bars reach from the worst to the best draw of samples."
    return section("Router: how many samples it takes", text, plot(figure, 320))


def _confusion(measured: Mapping[str, Any]) -> str:
    go = plotly()
    rows: Mapping[str, Mapping[str, int]] = measured["confusion"]
    fields = list(next(iter(rows.values())))
    counts = [[row[name] for name in fields] for row in rows.values()]
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=fields,
            y=list(rows),
            text=counts,
            texttemplate="%{text}",
            colorscale=[[0, "#ffffff"], [1, COLOURS[0]]],
            zmin=0,
            zmax=1,
            showscale=False,
            hovertemplate="%{y} taken for %{x}: %{text} (%{z:.1%})<extra></extra>",
        )
    )
    figure.update_layout(xaxis_title="likeliest field", yaxis={"title": "right field", "autorange": "reversed"})
    text = f"{measured['samples']} samples of known fields"
    if measured["accuracy"] is not None:
        text += f", {measured['accuracy']:.1%} of them right"
    if measured["outside"]:
        text += f"; {measured['outside']} of none, of which {measured['outside_to_fallback']:.1%} take the fallback"
    return section("Router: right and wrong fields", f"{text}.", plot(figure, 120 + 44 * len(rows)))


def _reliability(measured: Mapping[str, Any]) -> str:
    go = plotly()
    bins = measured["reliability"]
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": COLOURS[-1], "dash": "dot"}, name="as sure as right"
    )
    figure.add_scatter(
        x=[part["confidence"] for part in bins],
        y=[part["accuracy"] for part in bins],
        mode="lines+markers",
        line={"color": COLOURS[0]},
        name="router",
        customdata=[part["count"] for part in bins],
        hovertemplate="said %{x:.1%}, right %{y:.1%} of %{customdata}<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": "probability of the likeliest field", "tickformat": ".0%"},
        yaxis={"title": "share of right ones", "tickformat": ".0%"},
    )
    text = "Under the dotted line the router is surer than it should be."
    if measured["calibration_error"] is not None:
        text += f" Expected calibration error {measured['calibration_error']:.3f}."
    return section("Router: is it as sure as it should be", text, plot(figure, 360))


def _coverage(measured: Mapping[str, Any]) -> str:
    go = plotly()
    curve = measured["coverage_curve"]
    figure = go.Figure()
    figure.add_scatter(
        x=[point["coverage"] for point in curve],
        y=[point["accuracy"] for point in curve],
        mode="lines",
        line={"color": COLOURS[0]},
        customdata=[point["threshold"] for point in curve],
        hovertemplate="threshold %{customdata:.3f}: %{x:.1%} kept, %{y:.1%} right<extra></extra>",
        showlegend=False,
    )
    if measured["kept"] is not None:
        figure.add_vline(x=measured["kept"], line={"color": COLOURS[1], "dash": "dot"})
    figure.update_layout(
        xaxis={"title": "share of known requests over the threshold", "tickformat": ".0%"},
        yaxis={"title": "accuracy among them", "tickformat": ".1%"},
    )
    text = "What a higher threshold buys; the dotted line is the router's own."
    return section("Router: accuracy against coverage", text, plot(figure, 320))


def _picture(points: Sequence[Mapping[str, Any]]) -> str:
    go = plotly()
    figure = go.Figure()
    fields = list(dict.fromkeys(point["field"] for point in points))
    for field, colour in zip(fields, COLOURS * len(fields), strict=False):
        field_points = [point for point in points if point["field"] == field]
        figure.add_scatter(
            x=[point["x"] for point in field_points],
            y=[point["y"] for point in field_points],
            mode="markers",
            name=escape(field),
            marker={"color": colour, "size": 7, "opacity": 0.75},
            text=[escape(point["text"]) for point in field_points],
            hovertemplate="%{text}<extra>" + escape(field) + "</extra>",
        )
    figure.update_layout(xaxis={"visible": False}, yaxis={"visible": False})
    text = "Embeddings in the plane of the training samples' two main axes; the text is shown under the pointer."
    return section("Router: where the samples lie", text, plot(figure, 560))
