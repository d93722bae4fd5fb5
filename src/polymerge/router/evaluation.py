"""How good a router is on samples that it has not seen.

Knows routers and samples; what it returns is plain data for tables, plots and JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.files import write_json
from ..errors import RouterError
from .calibrate import accuracy_against_coverage, auroc, calibration_error, reliability
from .fit import Progress, embed_all
from .picture import draw
from .record import router_folder
from .router import Router
from .samples import OUTSIDE, Sample

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class RouterEvaluation:
    """Routing measured on labelled samples. Shares of an empty set are None.

    Attributes:
        samples: with a field that the router knows; `outside` counts those that belong to none.
        accuracy: share of samples whose likeliest field is right, whatever the confidence. `by_field` splits it.
        confusion: right field -> {likeliest field: samples}; OUTSIDE is a row where there are such samples.
        calibration_error: of the likeliest field's probability, before any doubt about the domain.
        kept: share of known samples over the threshold, and `accuracy_kept`, of right ones among them.
        outside_to_fallback: share of outside samples under the threshold.
        auroc: probability that a known sample's confidence is over an outside one's.
        reliability, coverage_curve, picture: what the report draws.
    """

    samples: int
    outside: int
    accuracy: float | None
    by_field: dict[str, float]
    confusion: dict[str, dict[str, int]]
    calibration_error: float | None
    threshold: float
    kept: float | None
    accuracy_kept: float | None
    outside_to_fallback: float | None
    auroc: float | None
    reliability: list[dict[str, float]]
    coverage_curve: list[dict[str, float]]
    picture: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_router(router: Router, samples: Sequence[Sample], *, progress: Progress | None = None) -> RouterEvaluation:
    """Measures a router on samples; those of the field "none" belong to no field and should take the fallback.

    Raises:
        RouterError: no samples, an empty text, or a field that the router does not know.
    """
    fields = [*router.record.fields]
    if not samples:
        raise RouterError("no samples to measure the router on; DIR/NAME/test.jsonl holds those of the field NAME")
    for sample in samples:
        if sample.field not in (*fields, OUTSIDE):
            raise RouterError(
                f"the samples' field {sample.field!r} is none of the router's ({', '.join(fields)}); "
                f"leave such samples out, or mark them as {OUTSIDE!r}"
            )
    raw = embed_all(router.embedder, [sample.text for sample in samples], progress)
    judged = router.judge(raw)
    inside = np.array([sample.field != OUTSIDE for sample in samples])
    labels = np.array([fields.index(sample.field) if sample.field != OUTSIDE else -1 for sample in samples])
    likeliest = judged.probabilities.argmax(axis=1)
    right = likeliest == labels
    confidence, kept = judged.confidence, judged.confidence >= router.record.threshold
    pairs = Counter(zip([s.field for s in samples], [fields[n] for n in likeliest], strict=True))
    probability = judged.probabilities.max(axis=1)[inside]
    return RouterEvaluation(
        samples=int(inside.sum()),
        outside=int((~inside).sum()),
        accuracy=_share(right[inside]),
        by_field={name: float(right[labels == n].mean()) for n, name in enumerate(fields) if (labels == n).any()},
        confusion={
            row: {name: pairs[row, name] for name in fields}
            for row in [*fields, OUTSIDE]
            if any(sample.field == row for sample in samples)
        },
        calibration_error=calibration_error(probability, right[inside]) if inside.any() else None,
        threshold=router.record.threshold,
        kept=_share(kept[inside]),
        accuracy_kept=_share(right[inside & kept]),
        outside_to_fallback=_share(~kept[~inside]),
        auroc=auroc(confidence[inside], confidence[~inside]) if inside.any() and not inside.all() else None,
        reliability=reliability(probability, right[inside]),
        coverage_curve=accuracy_against_coverage(confidence[inside], right[inside]),
        picture=draw(router, router.head.space(raw), samples),
    )


def _share(flags: Any) -> float | None:
    return float(flags.mean()) if len(flags) else None


def save_evaluation(bundle: Bundle | str | Path, evaluation: RouterEvaluation) -> Path:
    """Writes an evaluation beside the bundle's router, where the report finds it."""
    file = router_folder(Bundle.open(bundle).path) / EVALUATION
    write_json(file, evaluation.to_json())
    return file
