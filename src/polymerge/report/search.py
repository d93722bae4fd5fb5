"""A search over recipes as a page: every trial, bytes against the worst expert's KL, and the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipe.rates import in_words
from .blocks import COLOURS, cards, plot, plotly, section, size, table, write_page


def write_search(explored: Mapping[str, Any], path: str | Path, *, footer: str) -> Path:
    """Writes the page of what `polymerge.search.explore.Explored.to_json` gives.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    trials, best = explored["trials"], explored["trials"][explored["best"]]
    figures = [
        (size(explored["limit"]), "budget"),
        (size(best["total_bytes"]), "best bundle"),
        (f"{best['worst_kl']:.2g}", "its worst expert's KL"),
        (f"{best['top1']:.1%}", "its top-1"),
    ]
    text = "Every trial is a merge that was measured on held-out prompts against the original experts."
    body = cards(figures) + section("Trials", text, _plot(explored))
    text = "On the front are those that no other beats in both bytes and KL."
    body += section("All trials", text, _table(trials, best))
    return write_page(path, "search", body, footer)


def _plot(explored: Mapping[str, Any]) -> str:
    go = plotly()
    figure, trials = go.Figure(), explored["trials"]
    for colour, code in zip(COLOURS, dict.fromkeys(trial["code"] for trial in trials), strict=False):
        of_code = [trial for trial in trials if trial["code"] == code]
        figure.add_scatter(
            x=[trial["total_bytes"] / 1e6 for trial in of_code],
            y=[trial["worst_kl"] for trial in of_code],
            text=[_words(trial) for trial in of_code],
            name=code,
            mode="markers",
            marker={"color": colour, "size": [12 if trial["on_front"] else 7 for trial in of_code]},
            hovertemplate="%{text}: %{x:.1f} MB, KL %{y:.2g}<extra>" + code + "</extra>",
        )
    line = sorted((trial for trial in trials if trial["on_front"]), key=lambda trial: trial["total_bytes"])
    figure.add_scatter(
        x=[trial["total_bytes"] / 1e6 for trial in line], y=[trial["worst_kl"] for trial in line], mode="lines",
        line={"color": COLOURS[-1], "shape": "hv"}, name="front", hoverinfo="skip",
    )  # fmt: skip
    figure.update_layout(
        xaxis_title="MB of the bundle (large marks: on the front)", yaxis_title="worst KL, nats a token"
    )
    figure.update_yaxes(type="log", dtick="D2", exponentformat="power", minor={"showgrid": True})
    return plot(figure, 460)


def _words(trial: Mapping[str, Any]) -> str:
    choice = trial["choice"]
    said = (in_words(trial["compress_rate"]), choice["scale"], f"embeddings {choice['embeddings']}")
    return ", ".join([f"rate {said[0]}", *said[1:], f"lm_head {choice['lm_head']}"])


def _table(trials: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> str:
    head = ("code", "rate", "scale", "embeddings", "lm_head", "bundle", "worst KL", "KL", "top-1", "front")
    rows = [
        (
            trial["code"],
            in_words(trial["compress_rate"]),
            trial["choice"]["scale"],
            trial["choice"]["embeddings"],
            trial["choice"]["lm_head"],
            size(trial["total_bytes"]),
            f"{trial['worst_kl']:.2g}",
            f"{trial['kl']:.2g}",
            f"{trial['top1']:.2%}",
            "best" if trial is best else "yes" if trial["on_front"] else "",
        )
        for trial in trials
    ]
    return table(head, rows)
