"""Questions of choice that would measure nothing are refused: equal or empty choices. Knows the harness's requests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from ..errors import DataError


def check_choices(requests: Iterable[Any]) -> None:
    """Of requests for log-likelihoods, those of one question together.

    Raises:
        DataError: a choice without text, or two that are the same, of which either would count as right.
    """
    questions: dict[tuple[str, Any], dict[Any, tuple[str, str]]] = defaultdict(dict)
    for request in requests:
        if request.doc_id is not None:
            questions[str(request.task_name), request.doc_id][request.idx] = request.args
    for (task, number), asked in questions.items():
        where = f"task {task}, question {number}"
        if any(not continuation.strip() for _, continuation in asked.values()):
            raise DataError(f"{where}: a choice is empty")
        if len(set(asked.values())) < len(asked):
            twice = next(pair for pair in asked.values() if list(asked.values()).count(pair) > 1)
            raise DataError(f"{where}: two choices are the same: {twice[1].strip()!r}")
