"""A router that learns from use: rows that say which expert was right or wrong for a request.

The old samples lie in the bundle, so only the new rows are sent. The fit is the usual one; the thresholds that the
router had stay. A router that would be worse on its old validation samples is not saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import StrictBool, model_validator

from ..bundle.bundle import Bundle
from ..data.rows import place
from ..data.schema import PromptRow, read_as
from ..errors import DataError, RouterError
from .embed import Progress
from .evaluation import measure_router
from .fit import Fitted, fit_samples
from .kinds import made_samples
from .loading import load_router
from .router import Router
from .samples import OUTSIDE, Sample
from .settings import FitSettings


class FeedbackRow(PromptRow):
    """A request, an expert ("average" is one) and whether it was the right one.

    Attributes:
        verdict: in words; or `right`, as the server keeps its playground's thumbs.
    """

    expert: str
    verdict: Literal["right", "wrong"] | None = None
    right: StrictBool | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> FeedbackRow:
        if (self.verdict is None) == (self.right is None):
            raise ValueError("needs either verdict, which is right or wrong, or right, which is true or false")
        return self

    @property
    def praises(self) -> bool:
        """Whether the expert was the right one."""
        return self.right if self.right is not None else self.verdict == "right"


class Learned(NamedTuple):
    """The router before, the one after, and how many samples of a field and strangers were new."""

    before: Router
    fitted: Fitted
    samples: int
    strangers: int


def learn_from_feedback(
    bundle: Bundle | str | Path, file: str | Path, *, device: str | None = None, progress: Progress | None = None
) -> Learned:
    """Fits the bundle's router again with the feedback of a JSONL file, and saves it.

    A row that calls an expert right makes its prompt a sample of the expert's field. A prompt whose only expert is
    called wrong becomes a stranger: the fallback is to answer it.

    Raises:
        RouterError: there is no router, it kept no validation samples, or it would be worse on them.
        DataError: a row is damaged, or names an expert that the router does not send to.
    """
    router = load_router(bundle, device)
    validation = [sample for sample in router.held if sample.field != OUTSIDE]
    if not validation:
        raise RouterError(
            "router feedback: this router kept no validation samples to be checked on; run `polymerge router fit` "
            "again with a NAME/validation.jsonl for every field"
        )
    samples, strangers = sort_rows(router, Path(file))
    fitted = learn(bundle, router, samples, strangers, progress=progress)
    fitted.router.save(bundle)
    return Learned(router, fitted, len(samples), len(strangers))


def learn(
    bundle: Bundle | str | Path,
    router: Router,
    samples: Sequence[Sample],
    strangers: Sequence[str],
    *,
    progress: Progress | None = None,
) -> Fitted:
    """The router fitted again with further samples and strangers; not saved. Raises RouterError where it is worse."""
    record = router.record
    old = [sample.text for sample in router.held if sample.field == OUTSIDE]
    validation = [sample for sample in router.held if sample.field != OUTSIDE]
    known, count = set(router.samples), len(router.samples) if record.labelled is None else record.labelled
    engine, made = router.embedder.engine, router.samples[count:]
    fitted = fit_samples(
        bundle,
        engine,
        [
            *router.samples[:count],
            *(sample for sample in dict.fromkeys(samples) if sample not in known),
        ],
        validation,
        strangers=list(dict.fromkeys([*old, *strangers])),
        made=made,
        # words without samples of their own stood beside all fields' samples, and are not kept
        beside=[] if made else made_samples(engine, record.descriptions),
        descriptions=record.descriptions,
        settings=FitSettings(embed=record.embed, classifier=record.classifier, fallback=record.fallback),
        experts=record.experts,
        model=record.model,
        progress=progress,
    )
    if record.format_version == fitted.router.record.format_version:  # those of an older one are of another space
        thresholds = {"threshold": record.threshold, "thresholds": record.thresholds}
        fitted.router.record = fitted.router.record.model_copy(update=thresholds)
    before, after = (_reached(each, validation) for each in (router, fitted.router))
    if after < before:
        raise RouterError(
            f"router feedback: {after} of {len(validation)} validation samples would reach their expert, {before} do "
            "now; the router stays as it is"
        )
    return fitted


def _reached(router: Router, samples: Sequence[Sample]) -> int:
    """How many samples reach the expert of their field."""
    measured = measure_router(router, samples)
    return round((measured.kept or 0.0) * (measured.accuracy_kept or 0.0) * len(samples))


def sort_rows(router: Router, file: Path) -> tuple[list[Sample], list[str]]:
    """Rows of a file as samples of fields, and as strangers."""
    experts = {"average", *router.record.experts.values()}
    right: dict[str, str] = {}
    wrong = []
    for number, row in read_as(FeedbackRow, file):
        if row.expert not in experts:
            raise DataError(f"{place(file, number)}: the router sends nothing to an expert {row.expert!r}")
        if row.praises:
            right[row.prompt] = row.expert
        else:
            wrong.append(row.prompt)
    chosen = {prompt: _field(router, prompt, expert) for prompt, expert in right.items()}
    strangers = [prompt for prompt, field in chosen.items() if field is None]
    strangers += [prompt for prompt in dict.fromkeys(wrong) if prompt not in right]
    return [Sample(prompt, field) for prompt, field in chosen.items() if field is not None], strangers


def _field(router: Router, prompt: str, expert: str) -> str | None:
    """The expert's field; of several, the likeliest for this prompt."""
    fields = [field for field, of_field in router.record.experts.items() if of_field == expert]
    if len(fields) < 2:
        return fields[0] if fields else None
    scores: Mapping[str, float] = router.route([prompt])[0].scores
    return fields[int(np.argmax([scores[field] for field in fields]))]
