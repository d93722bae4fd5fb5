"""Fitting a router: from labelled samples to a head, its calibration, and how much the number of samples matters.

Knows samples, vectors and settings; does not know files (`polymerge.router.record`). What has to be measured on samples
that the head has not seen comes from the validation samples or, without those, from cross-validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..bundle.bundle import Bundle
from ..engine.base import Engine, FloatArray
from ..errors import RouterError
from ..version import __version__
from .calibrate import (
    Bools,
    Floats,
    Ints,
    calibration_error,
    fit_temperature,
    softmax,
    threshold_for_accuracy,
    threshold_for_coverage,
)
from .classify import fit_classifier
from .embed import Embedder
from .head import Head, fit_head
from .outside import calibrate_outside, fit_outside
from .record import RouterRecord
from .router import Router
from .samples import Sample, check_training
from .settings import FitSettings
from .space import fit_space
from .table import MIXTURE, Table, check_expert, experts_of_fields

CURVE_SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
CURVE_DRAWS = 5
FOLDS = 5
EMBED_BATCH = 256  # texts between two notes of progress

# done, of all
Progress = Callable[[int, int], None]


class Labelled(NamedTuple):
    """Raw vectors [n, d] and the numbers of their fields [n]."""

    vectors: FloatArray
    labels: Ints

    def take(self, numbers: Ints | Bools) -> Labelled:
        return Labelled(self.vectors[numbers], self.labels[numbers])


class Fitted(NamedTuple):
    """A router and what was measured on the way: `report` is plain data for JSON."""

    router: Router
    report: dict[str, Any]


def fit_samples(
    bundle: Bundle | str | Path,
    engine: Engine,
    training: Sequence[Sample],
    validation: Sequence[Sample] = (),
    *,
    settings: FitSettings | None = None,
    table: Table | None = None,
    experts: Mapping[str, str] | None = None,
    model: str | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fits a router for a bundle. `Fitted.router.save(bundle)` stores it there.

    Args:
        engine: embeds: the bundle's, or another model's if `model` names its source.
        validation: samples for calibration and thresholds; without them, the training samples are cross-validated.
        table: the assessment table, field -> {expert: accuracy}.
        experts: field -> expert, before the table.
        progress: called with the number of texts embedded and of all.

    Raises:
        RouterError: samples that cannot be learned from, an empty text, an unknown expert, or a field without one.
    """
    bundle, settings = Bundle.open(bundle), settings or FitSettings()
    fields = check_training(training)
    strange = next((sample.field for sample in validation if sample.field not in fields), None)
    if strange is not None:
        raise RouterError(f"field {strange!r} has validation samples but no training samples")
    of_fields = experts_of_fields(fields, bundle.experts, table=table, given=experts)
    if settings.fallback != MIXTURE:
        check_expert(settings.fallback, bundle.experts, "the fallback")
    embedder = Embedder(engine, settings.embed)
    vectors = embed_all(embedder, [s.text for s in (*training, *validation)], progress)
    labels = np.array([fields.index(s.field) for s in (*training, *validation)], dtype=np.int64)
    everything = Labelled(vectors, labels)
    train, held = everything.take(np.arange(len(training))), everything.take(np.arange(len(training), len(labels)))
    calibrated = calibrate(train, held if len(held.labels) else None, settings)
    record = RouterRecord(
        polymerge_version=__version__,
        bundle=bundle.digest,
        model=model,
        fingerprint=engine.fingerprint,
        embed=settings.embed,
        classifier=settings.classifier,
        fields=tuple(fields),
        experts=of_fields,
        fallback=settings.fallback,
        temperature=calibrated.temperature,
        threshold=calibrated.threshold,
    )
    curve = learning_curve(train, held, settings) if len(held.labels) else []
    report = {
        "fields": fields,
        "samples": {name: int((train.labels == n).sum()) for n, name in enumerate(fields)},
        "measured_on": "validation" if len(held.labels) else "cross-validation",
        "learning_curve": curve,
        **calibrated.report,
    }
    return Fitted(Router(record, calibrated.head, training, engine), report)


def embed_all(embedder: Embedder, texts: Sequence[str], progress: Progress | None = None) -> FloatArray:
    """Raw vectors [n, d] of all texts; `progress` hears of every few hundred."""
    vectors = []
    for start in range(0, len(texts), EMBED_BATCH):
        vectors.append(embedder.embed(texts[start : start + EMBED_BATCH]).vectors)
        if progress:
            progress(min(start + EMBED_BATCH, len(texts)), len(texts))
    return np.concatenate(vectors)


class Calibrated(NamedTuple):
    """The final head with what was read off samples that it, or its like, had not seen."""

    head: Head
    temperature: float
    threshold: float
    report: dict[str, Any]


def calibrate(train: Labelled, held: Labelled | None, settings: FitSettings) -> Calibrated:
    """Temperature, the calibration of distances and the threshold."""
    scores, signs, labels, inside, outside = [], [], [], [], []
    for fitting, measuring in _splits(train, held, settings.seed):
        head = fit_head(settings.classifier, fitting.vectors, fitting.labels)
        scores.append(head.logits(measuring.vectors))
        signs.append(head.signs(measuring.vectors))
        labels.append(measuring.labels)
        near, far = leave_fields_out(fitting, measuring)
        inside.append(near)
        outside.append(far)
    logits, right_ones = np.concatenate(scores), np.concatenate(labels)
    temperature = fit_temperature(logits, right_ones)
    gate = calibrate_outside(np.concatenate(inside), np.concatenate(outside))
    head = fit_head(settings.classifier, train.vectors, train.labels).calibrated(*gate)
    probabilities = softmax(logits / temperature)
    confidence: Floats = probabilities.max(axis=1) * head.outside.known(np.concatenate(signs))
    right: Bools = probabilities.argmax(axis=1) == right_ones
    if settings.accuracy is None:
        threshold = threshold_for_coverage(confidence, settings.coverage)
    else:
        threshold = threshold_for_accuracy(confidence, right, settings.accuracy)
    kept = confidence >= threshold
    report = {
        "accuracy": float(right.mean()),
        "temperature": temperature,
        "calibration_error_before": calibration_error(softmax(logits).max(axis=1), right),
        "calibration_error": calibration_error(probabilities.max(axis=1), right),
        "threshold": threshold,
        "coverage": float(kept.mean()),
        "accuracy_over_threshold": float(right[kept].mean()) if kept.any() else None,
    }
    return Calibrated(head, temperature, threshold, report)


def _splits(train: Labelled, held: Labelled | None, seed: int) -> Iterator[tuple[Labelled, Labelled]]:
    """(to fit on, to measure on): the validation samples, or folds that hold every field on both sides."""
    if held is not None:
        yield train, held
        return
    from sklearn.model_selection import StratifiedKFold

    count = min(FOLDS, int(np.bincount(train.labels).min()))
    folds = StratifiedKFold(count, shuffle=True, random_state=seed)
    for fitting, measuring in folds.split(train.vectors, train.labels):
        yield train.take(fitting), train.take(measuring)


def leave_fields_out(fitting: Labelled, measuring: Labelled) -> tuple[Floats, Floats]:
    """Signs of `measuring`'s samples of known fields, and of those of a field that was kept away: every field in its
    turn plays the one that nobody has seen. That is what a stranger looks like, with no strangers at hand."""
    inside, outside = [], []
    for field in np.unique(fitting.labels):
        rest = fitting.take(fitting.labels != field)
        space = fit_space(rest.vectors)
        vectors = space(rest.vectors)
        signs = fit_outside(vectors, rest.labels).signs(space(measuring.vectors), vectors)
        inside.append(signs[measuring.labels != field])
        outside.append(signs[measuring.labels == field])
    return np.concatenate(inside), np.concatenate(outside)


def learning_curve(train: Labelled, held: Labelled, settings: FitSettings) -> list[dict[str, float]]:
    """Accuracy on the held-out samples for growing numbers of training samples a field, over several draws."""
    smallest = int(np.bincount(train.labels).min())
    points = []
    for size in [*(size for size in CURVE_SIZES if size < smallest), smallest]:
        scores = []
        for draw in range(CURVE_DRAWS if size < smallest else 1):
            rng = np.random.default_rng([settings.seed, size, draw])
            numbers = [
                rng.choice(np.flatnonzero(train.labels == n), size, replace=False) for n in np.unique(train.labels)
            ]
            drawn = train.take(np.concatenate(numbers))
            space = fit_space(drawn.vectors)
            classifier = fit_classifier(settings.classifier, space(drawn.vectors), drawn.labels)
            answers = classifier.logits(space(held.vectors)).argmax(axis=1)
            scores.append(float((answers == held.labels).mean()))
        points.append(
            {"samples": size, "accuracy": float(np.mean(scores)), "lowest": min(scores), "highest": max(scores)}
        )
    return points
