"""The router: texts in, routes out. One short forward pass of the average a text, and arithmetic on small arrays.

Knows a fitted head, its calibration, and which expert stands for which field. Does not know how it was fitted
(`polymerge.router.fit`) or how experts answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.files import disk_errors
from ..bundle.lock import PATIENCE, writing
from ..engine.base import Engine, FloatArray
from ..errors import RouterError
from .calibrate import Floats, softmax
from .embed import Embedder
from .head import Head
from .record import RECORD, RouterRecord, read_arrays, read_record, read_texts, router_folder, write_record
from .route import Neighbour, Route
from .samples import Sample
from .table import AVERAGE, MIXTURE

if TYPE_CHECKING:
    from ..model.assignment import RowExpert

REASONS = 3  # training samples that a route names as its reason


@dataclass(frozen=True)
class Judgement:
    """What the router thinks of n texts.

    Attributes:
        probabilities: [n, fields], calibrated, as if every text belonged to a field.
        known: [n], probability that the text belongs to any of the fields.
    """

    probabilities: Floats
    known: Floats

    @property
    def confidence(self) -> Floats:
        """[n], probability that the text belongs to a field and that it is the likeliest one."""
        confidence: Floats = self.probabilities.max(axis=1) * self.known
        return confidence


class Router:
    """A fitted router with the engine that embeds for it.

    Attributes:
        record: settings and calibration.
        head: what was learned from the training vectors.
        samples: the training samples, in the order of the head's vectors.
        held: the validation samples, and texts that feedback made strangers; for the next fit, not for routes.
    """

    def __init__(
        self, record: RouterRecord, head: Head, samples: Sequence[Sample], engine: Engine, held: Sequence[Sample] = ()
    ) -> None:
        self.record, self.head, self.samples, self.held = record, head, list(samples), list(held)
        self.embedder = Embedder(engine, record.embed)

    @classmethod
    def load(cls, bundle: Bundle | str | Path, engine: Engine) -> Router:
        """The bundle's router.

        Args:
            engine: the model that embeds: the bundle's own, or that of `record.model` where one was given to the fit.

        Raises:
            RouterError: the bundle has no router, it is damaged, or it was fitted for another bundle or model.
        """
        bundle = Bundle.open(bundle)
        folder = router_folder(bundle.path)
        record = read_record(folder)
        again = f"run `polymerge router fit {bundle.path} --data DIR` again"
        if record.bundle != bundle.digest:
            raise RouterError(
                f"{folder}: this router was fitted for another bundle ({record.bundle[:12]}, this one is "
                f"{bundle.digest[:12]}); {again}"
            )
        if record.model is not None and engine.fingerprint != record.fingerprint:
            raise RouterError(f"{folder}: this router embeds with {record.model}, and that model has changed; {again}")
        unknown = {record.fallback, *record.experts.values()} - {*bundle.experts, AVERAGE, MIXTURE}
        if unknown:
            raise RouterError(f"{folder}: routes to {sorted(unknown)[0]!r}, which the bundle does not hold; {again}")
        head, samples = read_head(folder, record), read_texts(folder, record.samples)
        held = read_texts(folder, record.held) if record.held else []
        if len(samples) != len(head.vectors):
            raise RouterError(f"{folder}: {record.samples} and {record.weights} are not of one router; {again}")
        return cls(record, head, samples, engine, held)

    def save(self, bundle: Bundle | str | Path) -> None:
        """Writes the router into the bundle's folder; the bundle itself does not change.

        Raises:
            RouterError: the bundle is no longer the one that the router was fitted for.
            LockedError: another process is writing to the bundle.
        """
        path = Bundle.open(bundle).path
        with disk_errors(path), writing(path, patience=PATIENCE):
            if Bundle.open(path).digest != self.record.bundle:
                raise RouterError(f"{path}: the bundle was changed while the router was fitted; fit it again")
            self.record = write_record(router_folder(path), self.record, self.head.to_arrays(), self.samples, self.held)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that routes depend on; the key of caches."""
        return hashlib.sha256(self.record.model_dump_json().encode()).hexdigest()

    def route(self, texts: Sequence[str]) -> list[Route]:
        """One route a text, in their order. Texts that are too long are cut in the middle (`Route.truncated`).

        Raises:
            RouterError: a text is empty, or one stands for the list.
        """
        if isinstance(texts, str):
            raise RouterError("route: give a list of texts; one text would be as many as it has letters")
        if not texts:
            return []
        raw, truncated = self.embedder.embed(texts)
        judged = self.judge(raw)
        nearest, cosines = self.head.nearest(raw, REASONS)
        return [
            self._route(
                dict(zip(self.record.fields, map(float, judged.probabilities[n]), strict=True)),
                float(judged.known[n]),
                tuple(
                    Neighbour(self.samples[i].text, self.samples[i].field, float(cosine))
                    for i, cosine in zip(nearest[n], cosines[n], strict=True)
                ),
                truncated[n],
            )
            for n in range(len(texts))
        ]

    def judge(self, raw: FloatArray) -> Judgement:
        """Probabilities of raw vectors [n, d]. Raises RouterError where they are not of the router's length."""
        length = len(self.head.space.mean)
        if raw.shape[1] != length:
            raise RouterError(f"the model's vectors have {raw.shape[1]} dimensions, the router was fitted to {length}")
        return Judgement(softmax(self.head.logits(raw) / self.record.temperature), self.head.known(raw))

    def _route(
        self, scores: Mapping[str, float], known: float, neighbours: tuple[Neighbour, ...], truncated: int
    ) -> Route:
        field = max(scores, key=lambda name: scores[name])
        confidence = scores[field] * known
        threshold = self.record.threshold_of(field)
        fallback = confidence < threshold
        return Route(
            expert=self._fallback(scores) if fallback else _asked(self.record.experts[field]),
            field=field,
            confidence=confidence,
            scores=scores,
            fallback=fallback,
            reason=_reason(field, scores[field], known, neighbours, threshold),
            neighbours=neighbours,
            truncated=truncated,
        )

    def _fallback(self, scores: Mapping[str, float]) -> RowExpert:
        if self.record.fallback != MIXTURE:
            return _asked(self.record.fallback)
        mixture: dict[str, float] = {}
        for field, probability in scores.items():
            expert = self.record.experts[field]
            mixture[expert] = mixture.get(expert, 0.0) + probability
        return mixture


def _reason(field: str, probability: float, known: float, neighbours: tuple[Neighbour, ...], threshold: float) -> str:
    share = sum(neighbour.field == field for neighbour in neighbours)
    near = f"{share} of the {len(neighbours)} nearest samples are of {field}"
    if known * probability >= threshold:
        return f"{field} at {probability:.0%}; {near}"
    doubt = "unlike the samples of any field" if known < probability else f"{field} at {probability:.0%} only"
    return f"{doubt}: confidence {known * probability:.2f} is under the threshold {threshold:.2f}"


def read_head(folder: Path, record: RouterRecord) -> Head:
    """What was learned. Raises RouterError where it is not of the record's kind and fields."""
    try:
        head = Head.from_arrays(record.classifier, read_arrays(folder, record))
        logits = head.logits(np.zeros((1, len(head.space.mean)), dtype=np.float32))
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise RouterError(
            f"{folder / record.weights}: is no {record.classifier} head ({error}); run `polymerge router fit` again"
        ) from None
    if logits.shape != (1, len(record.fields)):
        raise RouterError(
            f"{folder / record.weights}: tells {logits.shape[1]} fields apart, {RECORD} names {len(record.fields)}; "
            "run `polymerge router fit` again"
        )
    return head


def _asked(expert: str) -> str | None:
    """What an engine is asked for."""
    return None if expert == AVERAGE else expert
