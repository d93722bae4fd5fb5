"""Which questions need the strong one of two models: the curve of accuracy against the share of calls to it.

The answers of both models are recorded in the rows (`weak_correct`, `strong_correct`); no model answers here. A ridge
regression on the questions' embeddings predicts how much the strong model gains; every question is predicted by a fit
that has not seen it. The measures are those of RouteLLM (Ong et al. 2024, arXiv 2406.18665, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polymerge.report.blocks import COLOURS, plot, plotly, section, write_page

FOLDS = 5
POINTS = 101


def cost_quality(rows: Sequence[dict[str, Any]], embed: Callable[[Sequence[str]], Any]) -> dict[str, Any]:
    """The curve and its measures for rows with `prompt`, `weak_correct` and `strong_correct`."""
    weak = np.array([row["weak_correct"] for row in rows], dtype=float)
    strong = np.array([row["strong_correct"] for row in rows], dtype=float)
    gain = predicted_gain(embed([row["prompt"] for row in rows]), strong - weak)
    return {"rows": len(rows), **measures(weak, strong, gain)}


def predicted_gain(vectors: Any, gain: Any) -> Any:
    """Cross-validated predictions [n] of what the strong model gains on every question."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(2, 6, 9)))
    return cross_val_predict(model, vectors, gain, cv=KFold(FOLDS, shuffle=True, random_state=0))


def measures(weak: Any, strong: Any, gain: Any) -> dict[str, Any]:
    """Questions go to the strong model by falling `gain`. Returns the curve, APGR and CPT(50%), CPT(80%).

    PGR is the share of the gap between weak and strong that is recovered, APGR its mean over all shares of calls, and
    CPT(x) the smallest share of calls to the strong model that recovers x of the gap.
    """
    order = np.argsort(-gain, kind="stable")
    gained = np.concatenate([[0.0], np.cumsum((strong - weak)[order])]) / len(gain)  # accuracy over weak's
    shares = np.linspace(0, 1, len(gain) + 1)
    recovered = gained / (strong.mean() - weak.mean())
    kept = np.unique(np.linspace(0, len(gain), POINTS).astype(int))
    return {
        "weak": float(weak.mean()),
        "strong": float(strong.mean()),
        "oracle": float(np.maximum(weak, strong).mean()),
        "apgr": float(recovered.mean()),
        "cpt50": float(shares[np.argmax(recovered >= 0.5)]),
        "cpt80": float(shares[np.argmax(recovered >= 0.8)]),
        "curve": [{"strong_calls": float(shares[n]), "accuracy": float(weak.mean() + gained[n])} for n in kept],
    }


def draw_curves(curves: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """A page with the curve of every data set, against the straight line of sending questions at random."""
    go = plotly()
    parts = []
    for name, curve in curves.items():
        figure = go.Figure()
        x, y = ([point[key] for point in curve["curve"]] for key in ("strong_calls", "accuracy"))
        figure.add_scatter(x=x, y=y, name="by the embedding", line={"color": COLOURS[0]})
        ends = {"x": [0, 1], "y": [curve["weak"], curve["strong"]]}
        figure.add_scatter(**ends, name="at random", line={"color": COLOURS[-1], "dash": "dot"})
        figure.update_layout(
            xaxis={"title": "share of calls to the strong model", "tickformat": ".0%"}, yaxis_title="accuracy"
        )
        text = f"{curve['rows']} questions; APGR {curve['apgr']:.3f}, where sending at random gives 0.5."
        parts.append(section(name, text, plot(figure, 380)))
    write_page(file, "Cost and quality", "".join(parts), "benchmarks/route.py")
