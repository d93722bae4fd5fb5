"""Which questions need the strong one of two models: the curve of accuracy against the share of calls to it.

The answers of both models are recorded in the rows (`weak_correct`, `strong_correct`); neither answers here. A ridge
regression predicts how much the strong model gains: on the questions' embeddings, or on what the model that embeds
knows of its own answers (`own_signs`); or the sum of both. Every question is predicted by a fit that has not seen it.
The measures are those of RouteLLM (Ong et al. 2024, arXiv 2406.18665, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polymerge.engine.base import Engine, GenerateRequest, ScoreRequest
from polymerge.report.blocks import COLOURS, plot, plotly, section, write_page

FOLDS = 5
POINTS = 101
EMBEDDING, SIGNS, BOTH = "the question's embedding", "the model's own signs", "both"
ESTIMATE = "\n\nDo you know the right answer to this question, yes or no?"


def cost_quality(
    rows: Sequence[dict[str, Any]], embed: Callable[[Sequence[str]], Any], engine: Engine
) -> dict[str, dict[str, Any]]:
    """The curve and its measures for rows with `prompt`, `weak_correct` and `strong_correct`, by what predicts."""
    weak = np.array([row["weak_correct"] for row in rows], dtype=float)
    strong = np.array([row["strong_correct"] for row in rows], dtype=float)
    prompts = [row["prompt"] for row in rows]
    vectors, signs = embed(prompts), own_signs(engine, prompts)
    gain = strong - weak
    by_embedding, by_signs = predicted_gain(vectors, gain), predicted_gain(signs, gain)
    predicted = {EMBEDDING: by_embedding, SIGNS: by_signs, BOTH: by_embedding + by_signs}
    return {name: {"rows": len(rows), **measures(weak, strong, each)} for name, each in predicted.items()}


def own_signs(engine: Engine, prompts: Sequence[str]) -> Any:
    """[n, 5], what a model knows of its own answer: how surely it begins it (log-probability a token of its first
    eight), how alike two drawn answers are (words in common), whether it says that it knows the answer, how likely the
    question is to it, and how long."""
    begun = engine.generate([GenerateRequest(prompt, max_new_tokens=8, ignore_eos=True) for prompt in prompts])
    sure = engine.loglikelihood([ScoreRequest(q, a.text) for q, a in zip(prompts, begun, strict=True)])
    drawn = [
        engine.generate([GenerateRequest(q, max_new_tokens=24, temperature=1.0, seed=n) for q in prompts])
        for n in range(2)
    ]
    yes, no = (engine.loglikelihood([ScoreRequest(q + ESTIMATE, word) for q in prompts]) for word in (" Yes", " No"))
    known = engine.loglikelihood([ScoreRequest("", q) for q in prompts])
    return np.array(
        [
            (
                first.log_likelihood / max(first.tokens, 1),
                _alike(one.text, other.text),
                says.log_likelihood - denies.log_likelihood,
                question.log_likelihood / question.tokens,
                np.log(question.tokens),
            )
            for first, one, other, says, denies, question in zip(sure, *drawn, yes, no, known, strict=True)
        ]
    )


def _alike(one: str, other: str) -> float:
    """Words that stand in both, as a share of those that stand in any."""
    words, others = set(one.lower().split()), set(other.lower().split())
    return len(words & others) / max(len(words | others), 1)


def predicted_gain(vectors: Any, gain: Any) -> Any:
    """Cross-validated predictions [n] of what the strong model gains on every question."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(0, 6, 13)))
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


def draw_curves(curves: Mapping[str, Mapping[str, Mapping[str, Any]]], file: Path) -> None:
    """A page with the curves of every data set, against the straight line of sending questions at random."""
    go = plotly()
    parts = []
    for name, systems in curves.items():
        figure = go.Figure()
        for number, (system, curve) in enumerate(systems.items()):
            x, y = ([point[key] for point in curve["curve"]] for key in ("strong_calls", "accuracy"))
            figure.add_scatter(x=x, y=y, name=system, line={"color": COLOURS[number]})
        first = next(iter(systems.values()))
        ends = {"x": [0, 1], "y": [first["weak"], first["strong"]]}
        figure.add_scatter(**ends, name="at random", line={"color": COLOURS[-1], "dash": "dot"})
        figure.update_layout(
            xaxis={"title": "share of calls to the strong model", "tickformat": ".0%"}, yaxis_title="accuracy"
        )
        shown = ", ".join(f"{system} {curve['apgr']:.3f}" for system, curve in systems.items())
        text = f"{first['rows']} questions; APGR: {shown}, where sending at random gives 0.5."
        parts.append(section(name, text, plot(figure, 380)))
    write_page(file, "Cost and quality", "".join(parts), "benchmarks/route.py")
