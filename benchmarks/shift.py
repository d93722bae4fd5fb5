"""The gate where users write otherwise than the samples do: who reaches their expert, and which strangers do not.

Every system has the same draws and the same gate; the gate of before (no background, one threshold that keeps 96% of
the validation samples) is a row beside it. Rows of `--shifted` name their field under `expert` ("none" for strangers)
and a `kind`, by which they are counted apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from polymerge.router.background import background
from polymerge.router.calibrate import auroc, fit_temperature, softmax, threshold_for_coverage
from polymerge.router.classify import fit_classifier
from polymerge.router.fit import calibrate
from polymerge.router.samples import OUTSIDE, Sample
from polymerge.router.settings import FitSettings
from polymerge.router.space import fit_space
from polymerge.router.unseen import Labelled

Vectors = Any  # [n, d], float32
Embed = Callable[[Sequence[str]], Vectors]
BEFORE = "the gate of before"


class Row(NamedTuple):
    """A text that users might send: its field, or none, and how it differs from the samples."""

    text: str
    field: str
    kind: str


class Judged(NamedTuple):
    """Of every row: the likeliest field's number, the confidence, and whether the expert is asked."""

    likeliest: Any
    confidence: Any
    asked: Any


def shift(
    train: Sequence[Sample],
    held: Sequence[Sample],
    rows: Sequence[Row],
    systems: dict[str, Embed],
    *,
    subsets: Sequence[Sequence[str]],
    sizes: Sequence[int],
    draws: int,
) -> list[dict[str, Any]]:
    """One line a system, subset of the fields and number of samples: means over draws with their 95% intervals."""
    others = [sample.text for sample in background()]
    topics = list(dict.fromkeys(sample.field for sample in background()))
    of_topics = np.array([topics.index(sample.field) for sample in background()])
    texts = [[s.text for s in train], [s.text for s in held], [row.text for row in rows], others]
    lines = []
    for name, embed in systems.items():
        vectors = [embed(part) for part in texts]
        strangers = Labelled(vectors[3], of_topics)
        for fields in subsets:
            labels = [
                np.array([fields.index(s.field) if s.field in fields else -1 for s in part])
                for part in (train, held, rows)
            ]
            kept = Labelled(vectors[1][labels[1] >= 0], labels[1][labels[1] >= 0])
            for size in sizes:
                for gate in (judge, judge_before) if name == next(iter(systems)) else (judge,):
                    measured = []
                    for draw in range(draws):
                        rng = np.random.default_rng([size, draw])
                        drawn = [rng.choice(np.flatnonzero(labels[0] == n), size, False) for n in range(len(fields))]
                        chosen = np.concatenate(drawn)
                        judged = gate(Labelled(vectors[0][chosen], labels[0][chosen]), kept, strangers, vectors[2])
                        measured.append(_measure(judged, rows, labels[2]))
                    shown = BEFORE if gate is judge_before else name
                    lines.append({"system": shown, "fields": len(fields), "samples": size, **_summary(measured)})
    return lines


def judge(train: Labelled, held: Labelled, strangers: Labelled, raw: Vectors) -> Judged:
    """By the router's own fit."""
    fitted = calibrate(train, held, strangers, FitSettings())
    probabilities = softmax(fitted.head.logits(raw) / fitted.temperature)
    confidence = probabilities.max(axis=1) * fitted.head.known(raw)
    return Judged(probabilities.argmax(axis=1), confidence, confidence >= fitted.threshold)


def judge_before(train: Labelled, held: Labelled, strangers: Labelled, raw: Vectors) -> Judged:
    """As it was: claims without a background and a distance, weighed on fields that are kept away in turn."""
    from sklearn.linear_model import LogisticRegression

    def signs(fitting: Labelled, asked: Vectors) -> Any:
        space = fit_space(fitting.vectors)
        near, far = space(fitting.vectors), space(asked)
        fields = np.unique(fitting.labels)
        claims = [
            LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
            .fit(near, fitting.labels == field)
            .decision_function(far)
            for field in (fields if len(fields) > 1 else ())
        ]
        claim = -np.max(claims, axis=0) if claims else np.zeros(len(far))
        return np.stack([claim, 1 - np.sort(far @ near.T, axis=1)[:, -5:].mean(axis=1)], axis=1)

    inside, outside = [], []
    for field in np.unique(train.labels):
        of_rest = signs(train.take(train.labels != field), held.vectors)
        inside.append(of_rest[held.labels != field])
        outside.append(of_rest[held.labels == field])
    known, strange = np.concatenate(inside), np.concatenate(outside)
    mix = np.array([1.0, 0.3]) / np.maximum(known.std(axis=0), 1e-9)
    values = np.concatenate([known, strange]) @ mix
    centre, width = values.mean(), max(values.std(), 1e-9)
    fitted = LogisticRegression(C=100.0, class_weight="balanced").fit(
        ((values - centre) / width)[:, None], np.repeat([0, 1], [len(known), len(strange)])
    )
    slope = max(float(fitted.coef_[0, 0]), 1e-3)
    space = fit_space(train.vectors)
    classifier = fit_classifier("logistic", space(train.vectors), train.labels)
    temperature = fit_temperature(classifier.logits(space(held.vectors)), held.labels)

    def confidences(asked: Vectors) -> tuple[Any, Any]:
        probabilities = softmax(classifier.logits(space(asked)) / temperature)
        strangeness = (signs(train, asked) @ mix - centre) / width * slope + fitted.intercept_[0]
        return probabilities.argmax(axis=1), probabilities.max(axis=1) / (1 + np.exp(np.clip(strangeness, -50, 50)))

    threshold = threshold_for_coverage(confidences(held.vectors)[1], 0.96)
    likeliest, confidence = confidences(raw)
    return Judged(likeliest, confidence, confidence >= threshold)


def _measure(judged: Judged, rows: Sequence[Row], labels: Any) -> dict[str, float]:
    """Shares that reach their expert by kind of shift, strangers refused by kind, and the AUROC of each kind's rows."""
    kinds = np.array([row.kind for row in rows])
    none = np.array([row.field == OUTSIDE for row in rows])
    measured = {}
    for kind in dict.fromkeys(kinds):
        known, strange = (kinds == kind) & (labels >= 0), (kinds == kind) & none
        if known.any():
            right = judged.likeliest[known] == labels[known]
            measured[f"right {kind}"] = float(right.mean())
            measured[f"reach {kind}"] = float((right & judged.asked[known]).mean())
            measured[f"AUROC {kind}"] = auroc(judged.confidence[known], judged.confidence[none])
        if strange.any():
            measured[f"refused {kind}"] = float((~judged.asked[strange]).mean())
    measured["reach"] = float((judged.asked & (judged.likeliest == labels))[labels >= 0].mean())
    measured["refused"] = float((~judged.asked)[none].mean())
    return measured


def _summary(measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    def interval(values: Sequence[float]) -> float:
        return 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0

    columns = {key: [each[key] for each in measured] for key in measured[0]}
    return {key: [statistics.mean(values), interval(values)] for key, values in columns.items()}


def tables(lines: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A table for every number of fields and of samples: systems down, shares across."""
    for fields, size in dict.fromkeys((line["fields"], line["samples"]) for line in lines):
        chosen = [line for line in lines if (line["fields"], line["samples"]) == (fields, size)]
        keys = [key for key in chosen[0] if key.startswith(("reach", "refused", "AUROC"))]
        shown = Table("share", *(line["system"] for line in chosen), title=f"{fields} fields, {size} samples each")
        for key in keys:
            shown.add_row(key, *(f"{line[key][0]:.3f} ± {line[key][1]:.3f}" for line in chosen))
        yield shown


def write_plot(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Shifted rows that reach their expert against strangers refused, a point a system."""
    from polymerge.report.blocks import COLOURS, plot, plotly, section, write_page

    go, _ = plotly()
    figure = go.Figure()
    for number, name in enumerate(dict.fromkeys(line["system"] for line in lines)):
        points = [line for line in lines if line["system"] == name]
        figure.add_scatter(
            x=[line["refused"][0] for line in points],
            y=[line["reach"][0] for line in points],
            mode="markers+text",
            name=name,
            marker={"color": COLOURS[number % len(COLOURS)], "size": 10},
            text=[f"{line['fields']}/{line['samples']}" for line in points],
            textposition="top center",
        )
    figure.update_layout(
        xaxis={"title": "strangers refused", "tickformat": ".0%"},
        yaxis={"title": "shifted rows that reach their expert", "tickformat": ".0%"},
    )
    text = "A point is a number of fields and of samples each. The gate is better the further up and right."
    write_page(path, "The gate under shift", section("Shift", text, plot(figure, 460)), "benchmarks/route.py")
