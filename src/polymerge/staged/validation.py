"""Direct answers, v1 and v2, and the ways of asking, on the same validation rows: the evidence for what is `auto`.

Knows rows with a known answer. Does not know where a field's rows come from, nor when an answer is right
(`polymerge.data.score`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.schema import AnsweredRow, read_all
from ..data.score import credit
from ..engine.base import Engine
from ..recipe.response import StageSettings
from .asking import ALL, AskingEvidence, ways_of_asking
from .evidence import Evidence, weigh, weigh_asking
from .formatter import Question
from .lead import Lead
from .pipeline import VERSIONS, Pipeline
from .thinker import Thinker

OnField = Callable[[str, str, int], None]


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with its answer. `final`: the number that alone counts, as in word problems. `schema`: of an answer
    that is JSON."""

    question: Question
    answer: str
    final: str | None = None
    schema: Mapping[str, Any] | None = None


def read_questions(file: str | Path, *, limit: int | None = None, max_new_tokens: int = 64) -> list[AnsweredQuestion]:
    """The rows of a JSONL file (`polymerge.data.schema.AnsweredRow`).

    Raises:
        DataError: the file or a line of it cannot be used.
    """
    return [
        AnsweredQuestion(Question(row.prompt, row.choices or (), max_new_tokens), row.answer, row.final, _schema(row))
        for row in read_all(AnsweredRow, file, limit)
    ]


def _schema(row: AnsweredRow) -> dict[str, Any] | None:
    """What a row says of its answer's form under the key `schema`."""
    schema = (row.model_extra or {}).get("schema")
    return schema if isinstance(schema, dict) else None


def score(asked: AnsweredQuestion, text: str) -> float:
    """Right or wrong for choices and numbers, near or far for free text; in [0, 1]."""
    return credit(text, asked.answer, choices=asked.question.choices, final=asked.final)


def validate(
    engine: Engine,
    thinker: Thinker,
    fields: Mapping[str, Sequence[AnsweredQuestion]],
    *,
    settings: StageSettings | None = None,
    experts: Mapping[str, str | None] | None = None,
    chat: bool = True,
    progress: OnField | None = None,
) -> Evidence:
    """Answers every field's rows directly and with both versions of the prompts.

    Args:
        experts: field -> expert; by default the expert of the field's name, or the average.
        progress: called with field, way and rows before each.

    Raises:
        ModelError: an unknown expert. SourceError: the thinker is not there.
    """
    settings = settings or StageSettings()
    named = {field: field if field in engine.experts else None for field in fields} | dict(experts or {})
    evidence = {}
    for field, questions in fields.items():
        scores = {}
        for way in ("direct", *VERSIONS):
            if progress:
                progress(field, way, len(questions))
            staged = way != "direct"
            variant = settings.model_copy(update={"use": "always", "fields": {}} | ({"prompts": way} if staged else {}))
            pipeline = Pipeline(
                engine, variant, thinker=thinker if staged else None, expert=named[field], chat=chat, low_memory=False
            )
            responses = pipeline.respond([asked.question for asked in questions])
            scores[way] = [score(asked, r.text) for asked, r in zip(questions, responses, strict=True)]
        evidence[field] = weigh(scores)
    return Evidence(bundle=engine.fingerprint, thinker=thinker.fingerprint, prompts=pipeline.digest, fields=evidence)


def validate_asking(
    engine: Engine,
    fields: Mapping[str, Sequence[AnsweredQuestion]],
    lead: Lead,
    *,
    progress: OnField | None = None,
) -> AskingEvidence:
    """Answers every field's rows directly in every way of asking that the lead makes possible.

    Args:
        progress: called with field, way and rows before each.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for area, questions in fields.items():
        scores[area] = {}
        for way, asking in ways_of_asking(lead).items():
            if progress:
                progress(area, way, len(questions))
            expert = area if area in engine.experts else None
            pipeline = Pipeline(engine, expert=expert, chat=asking.chat, lead=asking.lead)
            responses = pipeline.respond([asked.question for asked in questions])
            scores[area][way] = [score(asked, r.text) for asked, r in zip(questions, responses, strict=True)]
    together = {way: [value for area in scores.values() for value in area[way]] for way in ways_of_asking(lead)}
    measured = {area: weigh_asking(rows) for area, rows in {**scores, ALL: together}.items()}
    return AskingEvidence(system=lead.system, examples=lead.examples, fields=measured)
