"""The gate where users write otherwise than the samples do: who reaches their expert, and which strangers do not.

Every system has the same draws and the same gate; the gate of before (no background, one threshold that keeps 96% of
the validation samples) is a row beside it. Rows are those of `shifted.py`, or of a file (`--shifted`). Where a router
has fewer fields than there are, the rows of the others as they are count as strangers too.
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
AS_THEY_ARE, LEFT_OUT = "same wording", "a field left out"


class Row(NamedTuple):
    """A text that users might send: its field, or none, how it differs from the samples, and the right answer."""

    text: str
    field: str
    kind: str
    answer: str = ""


class Judged(NamedTuple):
    """Of every row: the likeliest field's number, the confidence, and whether the expert is asked."""

    likeliest: Any
    confidence: Any
    asked: Any


class Draw(NamedTuple):
    """What a router of these fields, fitted to one draw of samples, makes of the rows. `labels` are their fields'
    numbers, -1 for others'."""

    fields: Sequence[str]
    labels: Any
    judged: Judged


class Embedded(NamedTuple):
    """Vectors of samples, validation samples and rows, and of the background by topic; all of one system."""

    train: Vectors
    held: Vectors
    rows: Vectors
    strangers: Labelled


Gate = Callable[[Labelled, Labelled, Labelled, Vectors], Judged]


def embedded(train: Sequence[Sample], held: Sequence[Sample], rows: Sequence[Row], embed: Embed) -> Embedded:
    """All texts of the table, once."""
    topics = list(dict.fromkeys(sample.field for sample in background()))
    numbers = np.array([topics.index(sample.field) for sample in background()])
    strangers = Labelled(embed([sample.text for sample in background()]), numbers)
    asked = embed([row.text for row in rows])
    return Embedded(embed([s.text for s in train]), embed([s.text for s in held]), asked, strangers)


def drawn(
    vectors: Embedded,
    of_parts: Sequence[Sequence[str]],
    fields: Sequence[str],
    size: int,
    draws: int,
    gate: Gate,
) -> Iterator[Draw]:
    """Routers of so many samples a field.

    Args:
        of_parts: the fields of samples, validation samples and rows.
    """
    train, held, rows = (np.array([fields.index(f) if f in fields else -1 for f in part]) for part in of_parts)
    kept = Labelled(vectors.held[held >= 0], held[held >= 0])
    for draw in range(draws):
        rng = np.random.default_rng([size, draw])
        chosen = np.concatenate([rng.choice(np.flatnonzero(train == n), size, False) for n in range(len(fields))])
        labelled = Labelled(vectors.train[chosen], train[chosen])
        yield Draw(fields, rows, gate(labelled, kept, vectors.strangers, vectors.rows))


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
    of_parts = [[sample.field for sample in train], [sample.field for sample in held], [row.field for row in rows]]
    lines = []
    for name, embed in systems.items():
        vectors = embedded(train, held, rows, embed)
        gates: dict[str, Gate] = {name: judge}
        if name == next(iter(systems)):
            gates = {BEFORE: judge_before, **gates}
        for fields in subsets:
            for size in sizes:
                for shown, gate in gates.items():
                    made = drawn(vectors, of_parts, fields, size, draws, gate)
                    measured = [_measure(draw.judged, rows, draw.labels) for draw in made]
                    line = {"system": shown, "fields": len(fields), "samples": size, **_summary(measured)}
                    lines.append(line)
                    print(f"{shown}, {len(fields)} fields, {size} samples: {_short(line)}", flush=True)
    return lines


def _short(line: dict[str, Any]) -> str:
    return ", ".join(f"{key} {line[key][0]:.3f}" for key in ("reach shifted", "refused", "AUROC shifted"))


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
    """Shares that reach their expert by kind of shift, strangers refused by kind, and the AUROC of each kind's rows.

    `shifted` are all known rows but those that are as the samples are.
    """
    kinds = np.array([row.kind for row in rows], dtype=object)
    none = np.array([row.field == OUTSIDE for row in rows])
    left = (labels < 0) & ~none & (kinds == AS_THEY_ARE)
    kinds[left] = LEFT_OUT
    none |= left
    right = judged.asked & (judged.likeliest == labels)
    measured = {}
    groups = {kind: (kinds == kind) & (labels >= 0) for kind in dict.fromkeys(kinds[labels >= 0])}
    groups["shifted"] = (labels >= 0) & (kinds != AS_THEY_ARE)
    for kind, known in groups.items():
        measured[f"right {kind}"] = float((judged.likeliest == labels)[known].mean())
        measured[f"reach {kind}"] = float(right[known].mean())
        measured[f"AUROC {kind}"] = auroc(judged.confidence[known], judged.confidence[none])
    for kind in dict.fromkeys(kinds[none]):
        measured[f"refused {kind}"] = float((~judged.asked[none & (kinds == kind)]).mean())
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


def draw(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """A page of shifted rows that reach their expert against strangers refused, a point a system."""
    from polymerge.report.blocks import COLOURS, plot, plotly, section, write_page

    go = plotly()
    figure = go.Figure()
    for number, name in enumerate(dict.fromkeys(line["system"] for line in lines)):
        points = [line for line in lines if line["system"] == name]
        figure.add_scatter(
            x=[line["refused"][0] for line in points],
            y=[line["reach shifted"][0] for line in points],
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
    write_page(file, "The gate under shift", section("Shift", text, plot(figure, 460)), "benchmarks/route.py")
