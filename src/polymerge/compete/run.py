"""The run: a file in, a submission out, and what it did in numbers.

Knows files. How answers come about is `polymerge.compete.pieces`'s.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundle.files import disk_errors, scratches_of, write_bytes
from ..bundle.lock import writing
from ..bundle.place import settled
from ..errors import OutputExistsError, PolymergeError
from ..staged.formatter import Question
from ..staged.pipeline import Pipeline
from ..version import __version__
from .clock import TIME_LIMIT, OnProgress, peak_bytes
from .expected import Expected, OnPlan
from .flaws import flaws_of
from .journal import Journal
from .pieces import OnError, Run
from .scoring import check_scorable, score
from .table import BadRow, CompetitionRow, Table, read_table, submission

MAX_NEW_TOKENS = 64  # the kit's


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        skipped: the bad rows, as lines of text; their prediction is empty.
        staged: rows whose answer has a thought behind it.
        direct: reason -> rows that were answered directly.
        experts: expert -> rows.
        scores: where the input has targets; scored: how many rows have one.
        written: answers that were generated; flaws: how many of them are empty, cut or repeated.
        asked: way of asking -> direct answers, where validation chose the way.
        expected: what the plan said, where one was asked for.
    """

    rows: int
    skipped: list[str]
    staged: int
    direct: dict[str, int]
    experts: dict[str, int]
    seconds: float
    time_limit: float
    peak_memory: int
    scores: dict[str, float]
    written: int = 0
    flaws: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    expected: Expected | None = None
    scored: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compete(
    pipeline: Pipeline,
    source: str | Path,
    output: str | Path,
    *,
    limit: int | None = None,
    time_limit: float = TIME_LIMIT,
    memory_limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_error: OnError = "fail",
    overwrite: bool = False,
    progress: OnProgress | None = None,
    on_plan: OnPlan | None = None,
) -> Summary:
    """Answers a file of the competition and writes the submission.

    Args:
        pipeline: with `chat=False` its direct answers are those of the kit: bare prompts, summed log-likelihoods.
        limit: only the first rows.
        time_limit: seconds; also those of a run that was killed count.
        memory_limit: bytes; over it the thinker is unloaded and the rest answered directly.
        max_new_tokens: of a generated answer.
        on_error: `fail` refuses a file with bad rows before any work, `skip` leaves their prediction empty.
        overwrite: replace an earlier submission.
        on_plan: called once, after routing and before any thought or answer, with what the rest is expected to take; a
            few rows are timed for it.

    Raises:
        PolymergeError: a file that cannot be read, or, with `fail`, has bad rows. OutputExistsError, LockedError.
    """
    output = settled(output)
    check_submission(output, overwrite=overwrite)
    table = read_table(source, limit=limit)
    if table.bad and on_error == "fail":
        more = f" and {len(table.bad) - 1} more" if len(table.bad) > 1 else ""
        raise PolymergeError(f"{source}, {table.bad[0]}{more}; give --on-error skip to go on without")
    check_scorable(table.good)
    questions = [Question(row.text, row.choices, max_new_tokens) for row in table.good]
    with disk_errors(output), writing(output):
        check_submission(output, overwrite=overwrite)
        for left in scratches_of(output):
            left.unlink()
        journal = Journal(output, _identity(pipeline, table, limit, max_new_tokens, on_error), overwrite=overwrite)
        run = Run(pipeline, questions, journal, time_limit, memory_limit, on_error, progress, on_plan)
        answers = run.answers()
        summary = _summary(table, answers, run)
        write_bytes(output, submission(_predictions(table, answers)))
        journal.remove()
    return summary


def check_submission(output: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError unless a submission may be written to `output`."""
    if output.is_dir():
        raise OutputExistsError(f"{output}: is a folder; name the submission's file")
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output}: exists; give --overwrite to replace it, or another --output")


def _identity(pipeline: Pipeline, table: Table, limit: int | None, tokens: int, on_error: str) -> dict[str, Any]:
    identity = {
        "polymerge": __version__,
        "input": table.sha256,
        "limit": limit,
        "max_new_tokens": tokens,
        "on_error": on_error,
        "pipeline": pipeline.identity(),
        "seconds": 0.0,
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _predictions(table: Table, answers: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    remaining = iter(answers)
    return [(row.id, "" if isinstance(row, BadRow) else _prediction(next(remaining))) for row in table.rows]


def _prediction(answer: dict[str, Any]) -> str:
    return str(answer["text"] if answer["index"] is None else answer["index"])


def _summary(table: Table, answers: Sequence[dict[str, Any]], run: Run) -> Summary:
    whole = [(row, answer) for row, answer in zip(table.good, answers, strict=True) if "failed" not in answer]
    skipped = [str(row) for row in table.bad]
    skipped += [
        str(BadRow(row.line, row.id, answer["failed"]))
        for row, answer in zip(table.good, answers, strict=True)
        if "failed" in answer
    ]
    rows: list[CompetitionRow] = [row for row, _ in whole]
    reasons = Counter(answer["reason"] for _, answer in whole if answer["stage"] == "direct")
    experts = Counter(_name(answer["expert"]) for _, answer in whole)
    written, flaws = flaws_of(answer for _, answer in whole)
    return Summary(
        rows=len(table.rows),
        skipped=skipped,
        staged=sum(answer["stage"] == "staged" for _, answer in whole),
        direct=dict(reasons.most_common()),
        experts=dict(experts.most_common()),
        seconds=run.clock.seconds,
        time_limit=run.clock.limit,
        peak_memory=peak_bytes(),
        scores=score(rows, [_prediction(answer) for _, answer in whole]),
        written=written,
        flaws=flaws,
        asked=dict(Counter(_asked(run, answers)).most_common()),
        expected=run.expected,
        scored=sum(row.target is not None for row in rows),
    )


def _asked(run: Run, answers: Sequence[dict[str, Any]]) -> list[str]:
    """How the direct answers were asked for, where validation says how."""
    direct = [
        step.direct("") for step, answer in zip(run.steps, answers, strict=True) if answer.get("stage") == "direct"
    ]
    return [way for way in map(run.pipeline.asked, direct) if way is not None]


def _name(expert: Any) -> str:
    return expert if isinstance(expert, str) else "average" if expert is None else json.dumps(expert, sort_keys=True)
