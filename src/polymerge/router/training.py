"""From a folder of data to a router in the bundle: what `polymerge router fit` does.

Knows where samples, the assessment table and the router's files lie; the fitting itself is `polymerge.router.fit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.files import write_json
from ..engine.base import Engine
from .fit import Fitted, Progress, fit_router
from .picture import draw_samples
from .record import router_folder
from .samples import Sample, read_fields
from .settings import FitSettings
from .table import label_by_experts, read_table

ASSESSMENT = "assessment.json"
FIT_REPORT = "fit.json"


def fit_bundle(
    bundle: Bundle | str | Path,
    engine: Engine,
    data: Path,
    *,
    settings: FitSettings | None = None,
    fields: Sequence[str] | None = None,
    samples: int | None = None,
    table: Path | None = None,
    experts: Mapping[str, str] | None = None,
    label_with: Engine | None = None,
    chat: bool = True,
    model: str | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fits a router to `data`/NAME/train.jsonl and validation.jsonl and saves it in the bundle.

    Args:
        fields: which folders; all that have a train.jsonl otherwise.
        samples: of a field, at most.
        table: the assessment table; by default `router/assessment.json` in the bundle, where it exists.
        label_with: the bundle's engine, to label samples by the expert that answers them best; folders do not count.
        chat: ask through the chat template when labelling.

    Raises:
        RouterError: as `fit_router`, and for files that cannot be used.
    """
    bundle = Bundle.open(bundle)
    folder = router_folder(bundle.path)
    training = read_fields(data, "train", fields=fields, limit=samples)
    validation = read_fields(data, "validation", fields=fields, limit=samples)
    if label_with is not None:
        labelled = label_by_experts(label_with, [*training, *validation], chat=chat, progress=progress)
        training, validation = labelled[: len(training)], labelled[len(training) :]
        validation = _of_fields(validation, training)
    file = table or (folder / ASSESSMENT if (folder / ASSESSMENT).is_file() else None)
    fitted = fit_router(
        bundle,
        engine,
        training,
        validation,
        settings=settings,
        table=read_table(file) if file else None,
        experts=experts,
        model=model,
        progress=progress,
    )
    fitted.router.save(bundle)
    fitted.report["picture"] = draw_samples(fitted.router)
    write_json(folder / FIT_REPORT, fitted.report)
    return fitted


def _of_fields(samples: Sequence[Sample], training: Sequence[Sample]) -> list[Sample]:
    """Those whose field has training samples."""
    known = {sample.field for sample in training}
    return [sample for sample in samples if sample.field in known]
