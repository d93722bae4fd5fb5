"""Questions that would measure nothing are refused: of choice with equal, empty or no choices or a label that is none
of them, and free ones whose answer is empty. Knows the harness's tasks and requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import DataError

HINT = "has each its choices, all of them texts, and its answer among them?"


class CheckedTasks:
    """The harness's task manager, whose tasks are checked before a model is asked.

    Args:
        limit: as the harness's: so many questions of each task, or a share of them.
    """

    def __init__(self, manager: Any, limit: float | None) -> None:
        self._manager, self._limit = manager, limit

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """As the manager's.

        Raises:
            DataError: a question that measures nothing.
        """
        try:
            loaded = self._manager.load(*args, **kwargs)
        except (IndexError, TypeError) as error:  # what the harness makes of a task's first question
            raise DataError(f"a task's questions cannot be judged ({' '.join(str(error).split())}); {HINT}") from None
        for name, task in loaded["tasks"].items():
            check_task(name, task, self._limit)
        return loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def check_task(name: str, task: Any, limit: float | None) -> None:
    """The questions of a task of the harness that will be asked. Raises DataError as `check_question` does."""
    whole = limit is None or limit < 1
    for number, row in task.doc_iterator(limit=None if whole else int(limit or 0)):
        if problem := question_problem(task, row):
            raise DataError(f"task {name}, question {number}: {problem}")


def question_problem(task: Any, row: Any) -> str | None:
    """Why a question of a task measures nothing; None where it does, or where a function of the task judges it."""
    if task.config.process_results is not None:
        return None
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(row)
        said = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        labels = said if isinstance(said, list) else [said]
        return choices_problem(choices) or next(filter(None, (label_problem(one, choices) for one in labels)), None)
    if task.OUTPUT_TYPE != "generate_until" or task.config.doc_to_choice is not None:
        return None
    said = task.doc_to_target(row)
    blank = not any(str(one).strip() for one in (said if isinstance(said, list) else [said]))
    return "the answer is empty" if blank else None


def choices_problem(choices: Sequence[Any]) -> str | None:
    """Why nothing can be picked from them, or two would count as right."""
    if not len(choices):
        return "it has no choices"
    odd = next((choice for choice in choices if not isinstance(choice, str)), None)
    if odd is not None or None in choices:
        return f"the choice {odd!r} is no text"
    bare = [choice.strip() for choice in choices]
    if not all(bare):
        return "a choice is empty"
    twice = next((choice for choice in bare if bare.count(choice) > 1), None)
    return None if twice is None else f"two choices are the same: {twice!r}"


def label_problem(label: Any, choices: Sequence[str]) -> str | None:
    """A label is a choice's number from 0, or its text."""
    if isinstance(label, int) and not isinstance(label, bool):
        inside = 0 <= label < len(choices)
        return None if inside else f"the label {label} is the number of none of the {len(choices)} choices, from 0"
    return None if label in choices else f"the label {label!r} is not one of the choices"


def check_choices(requests: Iterable[Any]) -> None:
    """Of requests for log-likelihoods, those of one question together: for tasks that the harness loads by itself.

    Raises:
        DataError: a choice without text, or two that are the same.
    """
    questions: dict[tuple[str, Any], dict[Any, tuple[str, str]]] = defaultdict(dict)
    for request in requests:
        if request.doc_id is not None:
            questions[str(request.task_name), request.doc_id][request.idx] = request.args
    for (task, number), asked in questions.items():
        where = f"task {task}, question {number}"
        bare = [(context, continuation.strip()) for context, continuation in asked.values()]
        if not all(continuation for _, continuation in bare):
            raise DataError(f"{where}: a choice is empty")
        if len(set(bare)) < len(bare):
            twice = next(pair for pair in bare if bare.count(pair) > 1)
            raise DataError(f"{where}: two choices are the same: {twice[1]!r}")
