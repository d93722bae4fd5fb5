"""Direct answers, v1 and v2 on the same validation rows: the ablation, and the evidence for the policy `auto`.

Knows rows with a known answer and how an answer is scored. Does not know where a field's rows come from.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.base import Engine
from ..errors import PolymergeError
from ..recipe.response import StageSettings
from .evidence import Evidence, weigh
from .formatter import Question
from .pipeline import VERSIONS, Pipeline
from .thinker import Thinker

NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
OnField = Callable[[str, str, int], None]


@dataclass(frozen=True)
class Sample:
    """A question with its answer. `number`: only the last number counts, as in word problems."""

    question: Question
    answer: str
    number: bool = False


def read_samples(path: str | Path, *, limit: int | None = None, max_new_tokens: int = 64) -> list[Sample]:
    """JSON lines with `prompt`, `answer` and, where the answer is one of a list, `choices`; with `final` (a number)
    only that is compared.

    Raises:
        PolymergeError: the file or a line of it cannot be used.
    """
    path, samples = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PolymergeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines[:limit], 1):
        try:
            row: dict[str, Any] = json.loads(line)
            choices = tuple(map(str, row.get("choices") or ()))
            question = Question(str(row["prompt"]), choices, max_new_tokens)
            answer = str(row.get("final") or row["answer"])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise PolymergeError(f"{path}, line {number}: not a JSON object with prompt and answer") from None
        if choices and answer not in choices:
            raise PolymergeError(f"{path}, line {number}: the answer {answer!r} is not among the choices")
        samples.append(Sample(question, answer, number="final" in row))
    if not samples:
        raise PolymergeError(f"{path}: holds no rows")
    return samples


def score(sample: Sample, text: str) -> float:
    """Right or wrong for choices and numbers, the F1 of words and signs for free text; in [0, 1]."""
    if sample.question.choices:
        return float(text == sample.answer)
    if sample.number:
        found = NUMBER.findall(text)
        return float(bool(found) and found[-1].replace(",", "") == sample.answer)
    wanted, given = (Counter(re.findall(r"\w+|[^\w\s]", t.lower())) for t in (sample.answer, text))
    common = sum((wanted & given).values())
    return 2 * common / (sum(wanted.values()) + sum(given.values())) if common else 0.0


def validate(
    engine: Engine,
    thinker: Thinker,
    fields: Mapping[str, Sequence[Sample]],
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
    found = {}
    for field, samples in fields.items():
        scores = {}
        for way in ("direct", *VERSIONS):
            if progress:
                progress(field, way, len(samples))
            staged = way != "direct"
            own = settings.model_copy(update={"use": "always", "fields": {}} | ({"prompts": way} if staged else {}))
            pipeline = Pipeline(
                engine, own, thinker=thinker if staged else None, expert=named[field], chat=chat, low_memory=False
            )
            responses = pipeline.respond([sample.question for sample in samples])
            scores[way] = [score(sample, r.text) for sample, r in zip(samples, responses, strict=True)]
        found[field] = weigh(scores)
    return Evidence(bundle=engine.fingerprint, thinker=thinker.fingerprint, prompts=pipeline.digest, fields=found)
