"""How good a router is on samples that it has not seen.

Knows routers, samples and where both lie; what it returns is plain data for tables, plots and JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.files import write_json
from ..errors import RouterError
from .calibrate import accuracy_against_coverage, auroc, calibration_error, reliability
from .embed import Progress
from .fit import embed_all
from .loading import load_router
from .picture import draw
from .record import router_folder
from .router import Router
from .samples import OUTSIDE, Sample, read_fields, read_labelled

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


def evaluate_router(
    bundle: Bundle | str | Path,
    *,
    data: str | Path | None = None,
    file: str | Path | None = None,
    label: str = "expert",
    split: str = "test",
    samples: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> RouterEvaluation:
    """Measures the bundle's router on labelled samples and keeps the result beside it, for the report.

    Args:
        data: a folder with NAME/`split`.jsonl, where NAME is a field; `samples` of each at most.
        file: instead, a JSONL file whose rows have `prompt` and name their field under the key `label`; "none" is out
            of domain, and rows of fields that the router does not know are left out.
        say: told how many those are.

    Raises:
        RouterError: neither or both are given, there is no router, or samples cannot be used.
    """
    if (data is None) == (file is None):
        raise RouterError("router eval: give either --data or --file")
    router = load_router(bundle, device)
    if file is None:
        labelled = read_fields(Path(data or ""), split, fields=router.record.fields, limit=samples)
    else:
        labelled = _known(router, read_labelled(Path(file), label), say)
    evaluation = measure_router(router, labelled, progress=progress)
    save_evaluation(bundle, evaluation)
    return evaluation


def _known(router: Router, samples: Sequence[Sample], say: Callable[[str], None] | None) -> list[Sample]:
    """Samples of the router's fields and of none; says how many others were left out."""
    left = Counter(sample.field for sample in samples if sample.field not in (*router.record.fields, OUTSIDE))
    if left and say:
        names = ", ".join(f"{count} of {name}" for name, count in sorted(left.items()))
        say(f"left out, because the router does not know their field: {names}")
    return [sample for sample in samples if sample.field not in left]


def measure_router(router: Router, samples: Sequence[Sample], *, progress: Progress | None = None) -> RouterEvaluation:
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
    confidence = judged.confidence
    kept = confidence >= np.array([router.record.threshold_of(name) for name in fields])[likeliest]
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
