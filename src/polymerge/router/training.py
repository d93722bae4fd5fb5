"""From a folder of data to a router in the bundle: what `polymerge router fit` does.

Knows where samples, the assessment table and the router's files lie, and loads the models that embed and label; the
fitting itself is `polymerge.router.fit`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.files import write_json
from ..errors import RouterError
from .described import by_name
from .embed import Progress
from .fit import Fitted, fit_samples
from .kinds import made_samples
from .loading import load_engine
from .picture import draw_samples
from .record import assessment_file, router_folder
from .samples import Sample, samples_of
from .settings import ENOUGH, fit_settings
from .table import Table, label_by_experts, read_table

FIT_REPORT = "fit.json"


def fit_router(
    bundle: Bundle | str | Path,
    data: str | Path | Sequence[Sample] | Mapping[str, Sequence[str]] | None = None,
    *,
    describe: Mapping[str, str] | None = None,
    fields: Sequence[str] | None = None,
    samples: int | None = 256,
    classifier: str | None = None,
    template: str | None = None,
    layers: Sequence[int] | None = None,
    pooling: str | None = None,
    embed_with: str | None = None,
    table: str | Path | None = None,
    assign: Mapping[str, str] | None = None,
    self_label: bool = False,
    chat: bool = True,
    fallback: str = "average",
    coverage: float | None = None,
    accuracy: float | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fits a router to `data`/NAME/train.jsonl and validation.jsonl and saves it in the bundle.

    Args:
        data: a folder; or samples, or texts by their field, which are cross-validated. Without any the router is fitted
            to descriptions alone.
        describe: field -> what it is about: what is made of it stands in for the samples of fields with fewer than
            ENOUGH, and beside those of all fields where each has both. Without data or descriptions, the experts'
            names.
        fields: which folders; all that have a train.jsonl otherwise.
        samples: of a field and split, at most.
        classifier: as in `FitSettings`; None is logistic, and centroid without data.
        fallback, coverage, accuracy, seed: as in `FitSettings`.
        template, layers, pooling: as in `EmbedSettings`; a template may be named published, task or none.
        embed_with: another model to embed with, named as in a recipe. The experts are asked all the same where nothing
            but their names is known.
        table: the assessment table; by default `router/assessment.json` in the bundle, where it exists.
        assign: field -> expert, before the table.
        self_label: label samples by the expert that finds their `answer` likeliest; folders do not count.
        chat: ask through the chat template when labelling.

    Raises:
        RouterError: as `fit_samples`, and for settings and files that cannot be used.
    """
    classifier = classifier or ("centroid" if data is None else "logistic")
    settings = fit_settings(
        template=template, layers=layers, pooling=pooling, classifier=classifier, fallback=fallback,
        coverage=coverage, accuracy=accuracy, seed=seed,
    )  # fmt: skip
    bundle = Bundle.open(bundle)
    if data is None and self_label:
        raise RouterError("labelling by the experts needs rows to label; give data")
    rows = data if data is not None else []
    training = samples_of(rows, "train", fields=fields if data is not None else None, limit=samples)
    validation = samples_of(rows, "validation", fields=fields if data is not None else None, limit=samples)
    named_only = data is None and not describe
    if named_only:
        describe = by_name([name for name in bundle.experts if fields is None or name in fields])
    labeller = load_engine(bundle, None, device) if self_label else None
    embeds = labeller if labeller and embed_with is None else load_engine(bundle, embed_with, device)
    if labeller is not None:
        labelled = label_by_experts(labeller, [*training, *validation], chat=chat, progress=progress)
        training, validation = labelled[: len(training)], labelled[len(training) :]
        validation = _of_fields(validation, training)
    words, beside = _of_words(describe or {}, Counter(sample.field for sample in training), settings.classifier)
    own = None if not named_only else embeds if embed_with is None else load_engine(bundle, None, device)
    stand_ins = made_samples(embeds, words, experts=own, progress=progress)
    fitted = fit_samples(
        bundle, embeds, training, validation, made=() if beside else stand_ins, beside=stand_ins if beside else (),
        descriptions=words, settings=settings, table=_table_of(bundle, table), experts=assign, model=embed_with,
        progress=progress,
    )  # fmt: skip
    fitted.router.save(bundle)
    fitted.report["picture"] = draw_samples(fitted.router)
    write_json(router_folder(bundle.path) / FIT_REPORT, fitted.report)
    return fitted


def _of_words(describe: Mapping[str, str], labelled: Mapping[str, int], classifier: str) -> tuple[dict[str, str], bool]:
    """The descriptions that samples are made of, and whether these stand beside the labelled ones: where each field has
    both. Where one has too few, they stand in for those."""
    few = {field: words for field, words in describe.items() if labelled.get(field, 0) < ENOUGH}
    beside = not few and describe.keys() == labelled.keys() and classifier == "logistic"
    return dict(describe) if beside else few, beside


def _table_of(bundle: Bundle, given: str | Path | None) -> Table | None:
    """The assessment table: the one that was given, or the bundle's, if there is one."""
    usual = assessment_file(bundle.path)
    file = Path(given) if given else usual if usual.is_file() else None
    return read_table(file) if file else None


def _of_fields(samples: Sequence[Sample], training: Sequence[Sample]) -> list[Sample]:
    """Those whose field has training samples."""
    known = {sample.field for sample in training}
    return [sample for sample in samples if sample.field in known]
