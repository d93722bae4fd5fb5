"""A router without labels, and what one, two, four and eight samples a field add.

What stands in for samples, and beside two and more of a field, is made as `polymerge router fit --describe` makes it:
sentences of a field's description, and those of the package's requests that its words fit. A regression leans towards
what stands beside, a centroid counts it. Accuracy of the likeliest field, on validation samples (by which defaults were
chosen) and on the mixed test file; for both prompts. Knows samples and vectors; the texts are those of `described.py`
and `kinds.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from polymerge.router.background import background
from polymerge.router.classify import Kind
from polymerge.router.described import described_samples
from polymerge.router.head import fit_head
from polymerge.router.kinds import alike_samples, kinds
from polymerge.router.samples import Sample
from polymerge.router.settings import ENOUGH
from polymerge.router.unseen import Labelled

DESCRIPTIONS = {
    "bash": "bash commands for files and processes",
    "math": "arithmetic word problems",
    "rewrite": "spoken questions with slips of the tongue, to be cleaned up",
    "slots": "booking a table at a restaurant",
    "support": "a bank's customers who ask about cards, payments and cash",
}
SIZES = (0, 1, 2, 4, 8)
CLASSIFIERS: tuple[Kind, ...] = ("logistic", "centroid")
NOTHING, SENTENCES, KINDS = "samples alone", "descriptions", "descriptions and like kinds"
UNFORESEEN = "descriptions and less like kinds"
# The kinds of the five fields were known when the requests were written: without them, what a field gains whose kind
# nobody thought of.
OWN_KINDS = (
    "files and the shell", "sums in a story", "spoken sentences with slips", "a table at a restaurant",
    "customers of a bank",
)  # fmt: skip
Embed = Callable[[Sequence[str]], Any]


def made_samples(engine: Any, fields: Sequence[str]) -> dict[str, list[Sample]]:
    """By what they are made of."""
    words = {field: DESCRIPTIONS.get(field, field) for field in fields}
    sentences = described_samples(words)
    others = [request for request in kinds() if request.field not in OWN_KINDS]
    return {
        NOTHING: [],
        SENTENCES: sentences,
        KINDS: [*sentences, *alike_samples(engine, words)],
        UNFORESEEN: [*sentences, *alike_samples(engine, words, others)],
    }


def zero(
    train: Sequence[Sample],
    held: Sequence[Sample],
    asked: Sequence[Sample],
    made: dict[str, list[Sample]],
    systems: dict[str, Embed],
    draws: int,
) -> list[dict[str, Any]]:
    """A line a prompt, a way of making samples, a classifier and a number of labelled samples."""
    fields = sorted({sample.field for sample in train})
    lines = []
    for prompt, embed in systems.items():

        def labelled(samples: Sequence[Sample], embed: Embed = embed) -> Labelled:
            numbers = np.array([fields.index(sample.field) for sample in samples], dtype=np.int64)
            return Labelled(embed([sample.text for sample in samples]), numbers)

        topics = list(dict.fromkeys(sample.field for sample in background()))
        others = Labelled(
            embed([sample.text for sample in background()]), np.array([topics.index(s.field) for s in background()])
        )
        pool, measured = labelled(train), {"validation": labelled(held), "test": labelled(asked)}
        for name, samples in made.items():
            beside = labelled(samples) if samples else None
            for kind in CLASSIFIERS:
                for size in SIZES:
                    if size or beside:
                        leans = kind == "logistic" and size >= ENOUGH
                        shares = [
                            _accuracies(kind, drawn, others, measured, beside if leans else None)
                            for draw in range(draws if size else 1)
                            for drawn in [_joined(pool, size, draw, None if leans else beside)]
                        ]
                        line = {"prompt": prompt, "made": name, "classifier": kind, "samples": size}
                        lines.append(line | {part: _summary([s[part] for s in shares]) for part in measured})
    return lines


def _joined(pool: Labelled, size: int, draw: int, beside: Labelled | None) -> Labelled:
    """So many samples of the pool, and all made ones."""
    rng = np.random.default_rng([size, draw])
    fields = np.unique(pool.labels)
    drawn = pool.take(np.concatenate([rng.choice(np.flatnonzero(pool.labels == n), size, False) for n in fields]))
    if beside is None:
        return drawn
    return Labelled(np.concatenate([drawn.vectors, beside.vectors]), np.concatenate([drawn.labels, beside.labels]))


def _accuracies(
    kind: Kind, train: Labelled, others: Labelled, measured: dict[str, Labelled], beside: Labelled | None
) -> dict[str, float]:
    head = fit_head(kind, train, others, beside)
    return {
        name: float((head.logits(part.vectors).argmax(axis=1) == part.labels).mean()) for name, part in measured.items()
    }


def _summary(values: Sequence[float]) -> list[float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [statistics.mean(values), 1.96 * error]


def tables(lines: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A table for validation and one for test rows: numbers of samples across."""
    for part in ("validation", "test"):
        shown = Table("prompt", "made of", "classifier", *map(str, SIZES), title=f"samples a field, {part} rows")
        for key in dict.fromkeys((line["prompt"], line["made"], line["classifier"]) for line in lines):
            cells = {
                line["samples"]: line[part]
                for line in lines
                if (line["prompt"], line["made"], line["classifier"]) == key
            }
            shown.add_row(*key, *(f"{cells[n][0]:.1%} ± {cells[n][1]:.1%}" if n in cells else "" for n in SIZES))
        yield shown
