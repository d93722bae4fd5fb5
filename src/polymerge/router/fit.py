"""Fitting a router: from labelled samples to a head, its calibration, and how much the number of samples matters.

Knows samples, vectors and settings; does not know files (`polymerge.router.record`). What has to be measured on samples
that the head has not seen comes from the validation samples or, without those, from cross-validation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..bundle.bundle import Bundle
from ..engine.base import Engine, FloatArray
from ..errors import RouterError
from ..version import __version__
from .background import background
from .calibrate import (
    Bools,
    Floats,
    Ints,
    calibration_error,
    cross_fitted,
    fit_temperature,
    softmax,
    threshold_for_accuracy,
    threshold_for_coverage,
)
from .cost import thresholds, usual
from .embed import Embedder, Progress
from .gate import fit_gate
from .head import Head, fit_head
from .outside import fit_outside
from .record import RouterRecord
from .router import Router
from .samples import OUTSIDE, Sample, check_training, repeated
from .settings import FitSettings, with_template
from .table import MIXTURE, Table, check_expert, experts_of_fields
from .unseen import Labelled, at_random

CURVE_SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
CURVE_DRAWS = 5
EMBED_BATCH = 256  # texts between two notes of progress


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
    strangers: Sequence[str] = (),
    made: Sequence[Sample] = (),
    beside: Sequence[Sample] = (),
    descriptions: Mapping[str, str] | None = None,
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
        strangers: texts that belong to no field, beside the background's.
        made: samples that nobody labelled (`polymerge.router.described`); they may be the only ones.
        beside: such samples of fields that have labelled ones. A logistic regression leans towards them; nothing else
            sees them, and without some of every field nor does it.
        descriptions: field -> the words that those were made of, for the record.
        table: the assessment table, field -> {expert: accuracy}.
        experts: field -> expert, before the table.
        progress: called with the number of texts embedded and of all.

    Raises:
        RouterError: samples that cannot be learned from, an empty text, an unknown expert, or a field without one.
    """
    bundle, settings = Bundle.open(bundle), settings or FitSettings()
    requests, labelled, training = Counter(s.field for s in training), len(training), [*training, *made]
    fields = check_training(training)
    strange = next((sample.field for sample in validation if sample.field not in fields), None)
    if strange is not None:
        raise RouterError(f"field {strange!r} has validation samples but no training samples")
    of_fields = experts_of_fields(fields, bundle.experts, table=table, given=experts)
    if settings.fallback != MIXTURE:
        check_expert(settings.fallback, bundle.experts, "the fallback")
    seen = repeated(training, validation)
    validation = [sample for sample in validation if sample not in seen]
    embed = with_template(settings.embed, engine, min(requests[field] for field in fields))
    embedder = Embedder(engine, embed)
    if {sample.field for sample in beside} != set(fields):
        beside = ()
    train, held, others, leaning = _embedded(embedder, training, validation, strangers, beside, fields, progress)
    calibrated = calibrate(train, held if len(held.labels) else None, others, settings, labelled, leaning)
    record = RouterRecord(
        polymerge_version=__version__,
        bundle=bundle.digest,
        model=model,
        fingerprint=engine.fingerprint,
        embed=embed.model_copy(update={"layers": embedder.layers}),
        classifier=settings.classifier,
        fields=tuple(fields),
        experts=of_fields,
        fallback=settings.fallback,
        temperature=calibrated.temperature,
        threshold=calibrated.threshold,
        thresholds={} if settings.fixed else thresholds(of_fields, settings.fallback, table, calibrated.threshold),
        labelled=labelled,
        descriptions=dict(descriptions or {}),
    )
    report = {
        "fields": fields,
        "samples": {name: int((train.labels == n).sum()) for n, name in enumerate(fields)},
        "repeated": len(seen),
        "labelled": labelled,
        "measured_on": "validation" if len(held.labels) else "cross-validation" if labelled else None,
        "learning_curve": learning_curve(train, held, others, settings, leaning) if len(held.labels) else [],
        **calibrated.report,
    }
    kept = [*validation, *(Sample(text, OUTSIDE) for text in strangers)]
    return Fitted(Router(record, calibrated.head, training, engine, kept), report)


def _embedded(
    embedder: Embedder,
    training: Sequence[Sample],
    validation: Sequence[Sample],
    strangers: Sequence[str],
    beside: Sequence[Sample],
    fields: Sequence[str],
    progress: Progress | None,
) -> tuple[Labelled, Labelled, Labelled, Labelled | None]:
    """Training and validation samples by their fields, the background by its topics, and those that stand beside;
    strangers have no topic (-1)."""
    topics = list(dict.fromkeys(sample.field for sample in background()))
    texts = [*(s.text for s in [*training, *validation, *background()]), *strangers, *(s.text for s in beside)]
    vectors = embed_all(embedder, texts, progress)
    labels = np.array([fields.index(s.field) for s in (*training, *validation)], dtype=np.int64)
    numbers = [*(topics.index(sample.field) for sample in background()), *([-1] * len(strangers))]
    others = np.array(numbers, dtype=np.int64)
    leaning = np.array([fields.index(sample.field) for sample in beside], dtype=np.int64)
    count, end = len(training), len(labels) + len(others)
    return (
        Labelled(vectors[:count], labels[:count]),
        Labelled(vectors[count : len(labels)], labels[count:]),
        Labelled(vectors[len(labels) : end], others),
        Labelled(vectors[end:], leaning) if beside else None,
    )


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


def calibrate(
    train: Labelled,
    held: Labelled | None,
    others: Labelled,
    settings: FitSettings,
    labelled: int | None = None,
    beside: Labelled | None = None,
) -> Calibrated:
    """Head with its gate, temperature and threshold.

    Args:
        others: the background, by topic.
        labelled: how many of the training samples are requests, the first ones; None is all. Others are learned from
            and never measured on. Without any request nothing is known: no accuracy is reported, and the threshold is
            read off the background alone.
        beside: what the classifier leans towards.
    """
    known = labelled != 0 or held is not None
    splits = list(at_random(train, held, settings.seed, labelled or None))
    logits, labels = _unseen_logits(splits, others, settings, beside)
    temperature = fit_temperature(logits, labels)
    head = fit_head(settings.classifier, train, others, beside)
    gate = fit_gate(head.space, train, held, others, settings.seed)
    head = replace(head, outside=gate.outside)
    probabilities = cross_fitted(logits, labels)
    right: Bools = probabilities.argmax(axis=1) == labels
    threshold = usual(gate.known if known else None, gate.strange)
    if settings.fixed:
        confidence = probabilities.max(axis=1) * _unseen_known(head, splits, others)
        threshold = _threshold(confidence, right, settings)
    report: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "temperature": temperature,
        "calibration_error_before": calibration_error(softmax(logits).max(axis=1), right),
        "calibration_error": calibration_error(probabilities.max(axis=1), right),
        "threshold": threshold,
        "new_wording_kept": float((gate.known >= threshold).mean()),
        "strangers_refused": float((gate.strange < threshold).mean()),
    }
    if not known:
        report |= dict.fromkeys(("accuracy", "calibration_error_before", "calibration_error", "new_wording_kept"))
    return Calibrated(head, temperature, threshold, report)


def _unseen_logits(
    splits: Sequence[tuple[Labelled, Labelled]], others: Labelled, settings: FitSettings, beside: Labelled | None
) -> tuple[Floats, Ints]:
    """Logits of samples that the head that gave them had not seen, and their labels."""
    logits, labels = [], []
    for fitting, measuring in splits:
        head = fit_head(settings.classifier, fitting, others, beside)
        logits.append(head.logits(measuring.vectors))
        labels.append(measuring.labels)
    return np.concatenate(logits), np.concatenate(labels)


def _unseen_known(head: Head, splits: Sequence[tuple[Labelled, Labelled]], others: Labelled) -> Floats:
    """Probabilities of being known for the samples of `_unseen_logits`, by gates that had not seen them."""
    known, strangers = [], head.space(others.vectors)
    for fitting, measuring in splits:
        vectors = head.space(fitting.vectors)
        outside = fit_outside(vectors, fitting.labels, strangers, others.labels)
        known.append(head.outside.known(outside.signs(head.space(measuring.vectors), vectors)))
    return np.concatenate(known)


def _threshold(confidence: Floats, right: Bools, settings: FitSettings) -> float:
    """The threshold at which the wanted share of these samples is kept, or right."""
    if settings.accuracy is not None:
        return threshold_for_accuracy(confidence, right, settings.accuracy)
    return threshold_for_coverage(confidence, settings.coverage or 1.0)


def learning_curve(
    train: Labelled, held: Labelled, others: Labelled, settings: FitSettings, beside: Labelled | None = None
) -> list[dict[str, float]]:
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
            head = fit_head(settings.classifier, drawn, others, beside)
            answers = head.logits(held.vectors).argmax(axis=1)
            scores.append(float((answers == held.labels).mean()))
        points.append(
            {"samples": size, "accuracy": float(np.mean(scores)), "lowest": min(scores), "highest": max(scores)}
        )
    return points
