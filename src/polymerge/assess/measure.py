"""What one expert makes of one task: accuracy, token F1, and what it took.

Knows rows, the harness's tasks and an engine; does not know processes, caches or other candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.schema import AnsweredRow, read_all
from ..data.score import is_right, likeliest, token_f1
from ..engine.base import Engine, GenerateRequest, ScoreRequest
from ..errors import ModelError
from ..evaluate.tasks import STOP

if TYPE_CHECKING:
    from ..model.assignment import RowExpert


@dataclass(frozen=True)
class AskSettings:
    """How questions are put; the names are those of `AssessRecipe`."""

    limit: int | None = None
    num_fewshot: int | None = None
    max_new_tokens: int = 64
    chat_template: bool = True
    by_length: bool = False
    include_path: str | None = None


@dataclass(frozen=True)
class Measurement:
    """One expert on one task.

    Attributes:
        accuracy: in [0, 1].
        f1: mean token F1 of the rows without choices; None where there is none.
        questions: how many were asked.
        by_task: accuracy by the rows' `task`, or by the tasks of a group of the harness.
        tokens_per_second: read and written, by the model; None where every answer was remembered.
        peak_memory: bytes: the CUDA allocator's peak, or else the process's peak resident memory, so far.
        on_gpu: which of the two it is.
        weights_bytes: of the model as it was loaded.
    """

    accuracy: float
    questions: int
    f1: float | None = None
    by_task: Mapping[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    peak_memory: int = 0
    on_gpu: bool = False
    weights_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_rows(engine: Engine, file: Path, expert: RowExpert, settings: AskSettings) -> Measurement:
    """Rows of a JSONL file: choices by log-likelihood, everything else by a greedy answer.

    Raises:
        DataError: an unusable row. ModelError: a question that the engine cannot take.
    """
    rows = read_all(AnsweredRow, file, settings.limit)
    closed = [row for row in rows if row.choices is not None]
    free = [row for row in rows if row.choices is None]
    chosen = _choices(engine, closed, expert, settings)
    written = _answers(engine, free, expert, settings)
    right: list[bool] = []
    kinds: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip([*closed, *free], [*chosen, *written], strict=True):
        right.append(is_right(text, row.answer, choices=row.choices, final=row.final))
        kinds[row.task or ""].append(right[-1])
    f1 = [token_f1(text, row.answer) for row, text in zip(free, written, strict=True)]
    return Measurement(
        accuracy=sum(right) / len(right),
        questions=len(rows),
        f1=sum(f1) / len(f1) if f1 else None,
        by_task={kind: sum(marks) / len(marks) for kind, marks in sorted(kinds.items())} if len(kinds) > 1 else {},
    )


def measure_harness(engine: Engine, task: str, expert: RowExpert, settings: AskSettings) -> Measurement:
    """A task, group or pattern of the harness, by its own metric of accuracy.

    Raises:
        RecipeError: no such task, or its data cannot be loaded. ModelError: it measures no accuracy.
    """
    from ..evaluate.run import HarnessSettings, accuracy, evaluate

    results = evaluate(
        engine,
        [task],
        lambda questions: [expert] * len(questions),
        include_path=settings.include_path,
        settings=HarnessSettings(num_fewshot=settings.num_fewshot, limit=settings.limit, bootstrap_iters=0),
    )
    groups = results.get("groups") or {}
    single = {name: accuracy(metrics) for name, metrics in results["results"].items() if name not in groups}
    values = {name: value for name, value in single.items() if value is not None}
    if not values:
        raise ModelError(f"task {task!r} measures no accuracy")
    whole = accuracy(groups[task]) if task in groups else None
    counts = results.get("n-samples", {})
    return Measurement(
        accuracy=sum(values.values()) / len(values) if whole is None else whole,
        questions=sum(int(counts[name]["effective"]) for name in values if name in counts),
        by_task=values if len(values) > 1 else {},
    )


def _choices(engine: Engine, rows: Sequence[AnsweredRow], expert: RowExpert, settings: AskSettings) -> list[str]:
    requests, chosen = [], []
    for row in rows:
        context = _prompt(engine, row, expert, settings)
        requests += [ScoreRequest(context, choice, expert) for choice in row.choices or ()]
    scores = iter(engine.loglikelihood(requests))
    for row in rows:
        choices = row.choices or ()
        values = [next(scores).log_likelihood for _ in choices]
        chosen.append(choices[likeliest(values, [*map(len, choices)] if settings.by_length else None)])
    return chosen


def _answers(engine: Engine, rows: Sequence[AnsweredRow], expert: RowExpert, settings: AskSettings) -> list[str]:
    length = engine.max_length_of(expert)
    room = length - settings.max_new_tokens
    if room < 1:
        raise ModelError(f"max_new_tokens {settings.max_new_tokens} fills the model's context of {length}")
    requests = [
        GenerateRequest(
            _prompt(engine, row, expert, settings)[-room:], expert, max_new_tokens=settings.max_new_tokens, stop=STOP
        )
        for row in rows
    ]
    return [generation.text for generation in engine.generate(requests)]


def _prompt(engine: Engine, row: AnsweredRow, expert: RowExpert, settings: AskSettings) -> list[int]:
    if settings.chat_template:
        return engine.chat_prompt([{"role": "user", "content": row.prompt}], expert=expert)
    return engine.encode(f"{row.prompt}\n", expert=expert)
