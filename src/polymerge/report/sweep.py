"""A sweep as a page: bytes against KL, one line a code, and the table behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .blocks import COLOURS, plot, plotly, section, size, table, write_page


def write_sweep(points: Sequence[Mapping[str, Any]], path: str | Path, *, footer: str) -> Path:
    """Writes the page of a sweep's points, as `polymerge.search.sweep.to_json` gives them.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    text = "Distance to the original experts on held-out prompts, against the size of the bundle."
    body = section("Quality for bytes", text, _plot(points)) + section(
        "All points", "On the front are those that no other beats in both bytes and KL.", _table(points)
    )
    if points[0]["kept"] is not None:
        text = (
            "Share of the held-out answers that greedy decoding would give exactly. Kept is the mean of the experts' "
            "shares of their originals' accuracy."
        )
        body += section("Accuracy", text, _accuracies(points))
    return write_page(path, "sweep", body, footer)


def _plot(points: Sequence[Mapping[str, Any]]) -> str:
    go = plotly()
    figure = go.Figure()
    for colour, code in zip(COLOURS, dict.fromkeys(point["code"] for point in points), strict=False):
        line = sorted((p for p in points if p["code"] == code), key=lambda p: p["total_bytes"])
        figure.add_scatter(
            x=[point["total_bytes"] / 1e6 for point in line],
            y=[point["kl"] for point in line],
            text=[f"rate {point['compress_rate']:g}" for point in line],
            name=code,
            mode="lines+markers",
            marker={"color": colour, "size": [12 if point["on_front"] else 7 for point in line]},
            hovertemplate="%{text}: %{x:.1f} MB, KL %{y:.2g}<extra>" + code + "</extra>",
        )
    figure.update_layout(xaxis_title="MB of the bundle (large marks: on the front)", yaxis_title="KL, nats a token")
    figure.update_yaxes(type="log", dtick="D2", exponentformat="power", minor={"showgrid": True})
    return plot(figure, 460)


def _table(points: Sequence[Mapping[str, Any]]) -> str:
    experts = list(points[0]["experts"])
    head = ("code", "rate", "bundle", "residuals", "KL", *(f"KL {name}" for name in experts), "top-1", "front")
    rows = [
        (
            point["code"],
            f"{point['compress_rate']:g}",
            size(point["total_bytes"]),
            size(point["residual_bytes"]),
            f"{point['kl']:.2g}",
            *(f"{point['experts'][name]['kl']:.2g}" for name in experts),
            f"{point['top1']:.2%}",
            "yes" if point["on_front"] else "",
        )
        for point in points
    ]
    return table(head, rows)


def _accuracies(points: Sequence[Mapping[str, Any]]) -> str:
    experts = points[0]["experts"]
    head = ("code", "rate", *experts, "kept")
    rows = [["originals", "", *(_percent(expert["original_accuracy"]) for expert in experts.values()), ""]]
    for point in points:
        accuracies = [_percent(expert["accuracy"]) for expert in point["experts"].values()]
        rows.append([point["code"], f"{point['compress_rate']:g}", *accuracies, _percent(point["kept"])])
    return table(head, rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
