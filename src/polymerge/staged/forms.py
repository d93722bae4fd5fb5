"""Free, constrained, and think-then-constrain, on the same validation rows; of several thoughts the answers vote.

The thought is free and only the answer is held to a form (Tam et al. 2024, arXiv 2408.02442, measure what a form around
the thought costs); the vote is self-consistency (Wang et al. 2022, arXiv 2203.11171). Knows rows whose answers have a
form; does not know how one is held.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..data.rows import parse_object
from ..data.score import is_right
from ..engine.base import Engine
from ..engine.grammar import has_form
from ..engine.structure import Structure, choice_structure, json_object, json_structure
from ..recipe.response import StageSettings
from .evidence import FormScore
from .formatter import Question
from .pipeline import Pipeline
from .thinker import Thinker
from .validation import AnsweredQuestion

NUMBER = Structure("regex", r"-?\d{1,12}(\.\d{1,6})?", "final")


def form_of(asked: AnsweredQuestion) -> Structure | None:
    """The form of a row's answer: its schema, one of its choices, a number, or a JSON object as its answer is one;
    None for free text."""
    if asked.schema is not None:
        return json_structure(asked.schema, "schema")
    if asked.question.choices:
        return choice_structure(asked.question.choices, "choices")
    if asked.final is not None:
        return NUMBER
    try:
        parse_object(asked.answer)
    except ValueError:
        return None
    return json_object("answer")


def measure_forms(
    engine: Engine,
    thinker: Thinker,
    questions: Sequence[AnsweredQuestion],
    *,
    votes: Sequence[int],
    settings: StageSettings | None = None,
    expert: str | None = None,
    chat: bool = True,
) -> dict[str, FormScore]:
    """Validity and accuracy by way: free, constrained, and "think 4" for four thoughts and a vote.

    Args:
        questions: those whose answers have no form are left out.
        votes: numbers of thoughts. The first is the likeliest one, the others are drawn.

    Raises:
        ModelError: an unknown expert, or a form that cannot be held. SourceError: the thinker is not there.
    """
    rows = [(asked, form) for asked in questions if (form := form_of(asked)) is not None]
    if not rows:
        return {}
    variant = (settings or StageSettings()).model_copy(update={"use": "always", "fields": {}})
    direct = Pipeline(engine, variant, expert=expert, chat=chat)
    staged = Pipeline(engine, variant, thinker=thinker, expert=expert, chat=chat)
    bare = [replace(asked.question, choices=()) for asked, _ in rows]
    formed = [replace(asked.question, structure=form) for asked, form in rows]
    answers = {
        "free": [response.text.strip() for response in direct.respond(bare)],
        "constrained": [response.text.strip() for response in direct.respond(formed)],
    }
    answers |= _voted(staged, formed, votes)
    return {way: _scored(texts, rows) for way, texts in answers.items()}


def _voted(pipeline: Pipeline, questions: Sequence[Question], votes: Sequence[int]) -> dict[str, list[str]]:
    """The answer of most thoughts, the earliest of equals. Fewer thoughts are the first of the more."""
    steps, tried = pipeline.steps(questions), list[list[str]]()
    for seed in range(max(votes, default=0)):
        thoughts = pipeline.think(steps, seed=seed or None)
        tried.append([response.text.strip() for response in pipeline.answer(steps, thoughts)])
    made = {}
    for count in votes:
        rows = zip(*tried[:count], strict=True)
        made[f"think {count}"] = [_most(texts) for texts in rows]
    return made


def _most(texts: Sequence[str]) -> str:
    counts = Counter(map(_meaning, texts))
    return max(texts, key=lambda text: counts[_meaning(text)])


def _meaning(text: str) -> str:
    """Answers that differ in spaces or in the order of keys are one."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return text


def _scored(texts: Sequence[str], rows: Sequence[tuple[AnsweredQuestion, Structure]]) -> FormScore:
    valid = [has_form(form, text) for text, (_, form) in zip(texts, rows, strict=True)]
    right = [
        is_right(text, asked.answer, choices=asked.question.choices, final=asked.final)
        for text, (asked, _) in zip(texts, rows, strict=True)
    ]
    return FormScore(rows=len(rows), valid=sum(valid) / len(rows), right=sum(right) / len(rows))
