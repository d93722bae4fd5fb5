"""Fields to experts: by the assessment table (accuracy of every expert on every field) or by name.

Also labels samples by which expert answers them best, where nobody has sorted them. Knows names and likelihoods; does
not know vectors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..engine.base import Engine, ScoreRequest
from ..errors import RouterError
from .samples import Sample

if TYPE_CHECKING:
    from collections.abc import Collection

AVERAGE = "average"
MIXTURE = "mixture"
# field -> {expert: accuracy}
Table: TypeAlias = Mapping[str, Mapping[str, float]]
LABEL_BATCH = 64


def read_table(file: Path) -> Table:
    """The assessment table: {"fields": {field: {expert: accuracy}}}. Raises RouterError for anything else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RouterError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RouterError(f"{file}: not JSON ({error})") from None
    fields = data.get("fields") if isinstance(data, dict) else None
    if not isinstance(fields, dict) or not fields:
        raise RouterError(f'{file}: needs {{"fields": {{field: {{expert: accuracy}}}}}}')
    for field, row in fields.items():
        if not isinstance(row, dict) or not row:
            raise RouterError(f"{file}: field {field!r} needs at least one expert with its accuracy")
        for expert, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise RouterError(f"{file}: field {field!r}, expert {expert!r}: {value!r} is not an accuracy (0 to 1)")
    return fields


def experts_of_fields(
    fields: Sequence[str],
    experts: Collection[str],
    *,
    table: Table | None = None,
    given: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The expert of every field: the given one, else the table's best, else the one of the field's name.

    Where experts are equally good in the table, the one of the field's name is taken, then the bundle's first.

    Raises:
        RouterError: an unknown expert or field is named, or a field has no expert.
    """
    given = given or {}
    for field in given:
        if field not in fields:
            raise RouterError(f"field {field!r} is given an expert but has no samples{_hint(field, fields)}")
    chosen = {}
    for field in fields:
        row = (table or {}).get(field)
        for expert in [*(row or ()), *([given[field]] if field in given else [])]:
            check_expert(expert, experts, f"field {field!r}")
        if field in given:
            chosen[field] = given[field]
        elif row:
            order = [field, *experts, AVERAGE]
            chosen[field] = max(row, key=lambda expert: (row[expert], -order.index(expert)))
        elif field in experts:
            chosen[field] = field
        else:
            known = ", ".join(experts)
            raise RouterError(
                f"field {field!r} is no expert's name (the bundle holds {known}); give it one with "
                f"`--assign {field}=EXPERT` or with an assessment table"
            )
    return chosen


def check_expert(expert: str, experts: Collection[str], where: str) -> None:
    """Raises RouterError unless `expert` is "average" or one of the bundle's."""
    if expert != AVERAGE and expert not in experts:
        raise RouterError(
            f"{where}: no expert {expert!r} in the bundle, which holds {', '.join(experts)}{_hint(expert, experts)}"
        )


def _hint(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def label_by_experts(
    engine: Engine,
    samples: Sequence[Sample],
    *,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """The samples with the name of the expert as field that finds the reference answer likeliest.

    Args:
        chat: ask through the model's chat template instead of the bare text.
        progress: called with the number of samples done and of all.

    Raises:
        RouterError: a sample has no reference answer, or the engine has fewer than two experts.
    """
    if len(engine.experts) < 2:
        raise RouterError(f"labelling compares experts, and this model has {len(engine.experts)}")
    for number, sample in enumerate(samples, 1):
        if not sample.answer.strip():
            raise RouterError(f"sample {number} ({sample.text[:40]!r}) has no answer to label it by")
    labelled = []
    for start in range(0, len(samples), LABEL_BATCH):
        batch = samples[start : start + LABEL_BATCH]
        scores = engine.loglikelihood([request for sample in batch for request in _requests(engine, sample, chat)])
        for number, sample in enumerate(batch):
            answers = scores[number * len(engine.experts) : (number + 1) * len(engine.experts)]
            best = max(range(len(answers)), key=lambda n: answers[n].log_likelihood)
            labelled.append(Sample(sample.text, engine.experts[best], sample.answer))
        if progress:
            progress(len(labelled), len(samples))
    return labelled


def _requests(engine: Engine, sample: Sample, chat: bool) -> list[ScoreRequest]:
    return [_request(engine, sample, chat, expert) for expert in engine.experts]


def _request(engine: Engine, sample: Sample, chat: bool, expert: str) -> ScoreRequest:
    messages = [{"role": "user", "content": sample.text}]
    context = engine.chat_prompt(messages, expert=expert) if chat else engine.encode(sample.text, expert=expert)
    answer = engine.encode(sample.answer if chat else f" {sample.answer}", special=False, expert=expert)
    return ScoreRequest(context, answer, expert)
