"""Questions that would measure nothing are refused: of choice with equal, empty or too few choices or a label that is
none of them, and free ones whose answer is empty. Knows the harness's tasks and requests.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from jinja2 import TemplateError

from ..errors import DataError, RecipeError

HINT = "has each its choices, all of them texts, and its answer among them?"


class CheckedTasks:
    """The harness's task manager, whose tasks are checked before a model is asked.

    Args:
        limit: as the harness's: so many questions of each task, or a share of them.
        judged: whether the answers will be; else no question is looked at.
    """

    def __init__(self, manager: Any, limit: float | None, *, judged: bool = True) -> None:
        self._manager, self._limit, self._judged = manager, limit, judged

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """As the manager's.

        Raises:
            DataError: a question that measures nothing. RecipeError: a key that a task cannot have.
        """
        try:
            loaded = self._manager.load(*args, **kwargs)
        except (IndexError, TypeError) as error:  # what the harness makes of a task's first question
            reason = _one_line(error)
            if "TaskConfig.__init__()" in reason:
                raise RecipeError(f"a task is not written as the harness has it: {_told_key(reason)}") from None
            raise DataError(f"{_named(args)}: its questions cannot be judged ({reason}); {HINT}") from None
        except (TemplateError, SyntaxError) as error:  # an answer or a list of choices is read as Python's
            raise DataError(f"{_named(args)}: its first question cannot be read: {_one_line(error)}") from None
        for name, task in loaded["tasks"].items() if self._judged else ():
            check_task(name, task, self._limit)
        return loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def _told_key(reason: str) -> str:
    """The key that Python names, with those that are like it."""
    from lm_eval.config.task import TaskConfig

    named = re.search(r"unexpected keyword argument '(\w+)'", reason)
    if not named:
        return reason
    near = difflib.get_close_matches(named[1], [field.name for field in fields(TaskConfig)], n=1)
    return f"it has no key {named[1]!r}" + (f"; did you mean {near[0]}?" if near else "")


def check_task(name: str, task: Any, limit: float | None) -> None:
    """The questions of a task of the harness that will be asked. Raises DataError as `question_problem` says it."""
    from lm_eval.evaluator_utils import get_sample_size

    if not _is_judged_by_harness(task):
        return
    for number, row in task.doc_iterator(limit=get_sample_size(task, limit)):
        try:
            problem = question_problem(task, row)
        except Exception as error:  # a key that is missing, a template or a list that cannot be read
            problem = f"cannot be read: {_one_line(error) or type(error).__name__}"
        if problem:
            raise DataError(f"task {name}, question {number}: {problem}")


def _named(args: Sequence[Any]) -> str:
    """The tasks that were to be loaded."""
    given = args[0] if args and isinstance(args[0], list) else args
    return "task " + ", ".join(str(one.get("task", "?") if isinstance(one, dict) else one) for one in given)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _is_judged_by_harness(task: Any) -> bool:
    """Or by a function of the task's own, which knows what it takes."""
    from lm_eval.api.task import ConfigurableTask

    return task.config.process_results is None and type(task).process_results is ConfigurableTask.process_results


def question_problem(task: Any, row: Any) -> str | None:
    """Why a question of a task that the harness judges measures nothing; None where it does."""
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(row)
        if choices is None:
            return "its choices are null"
        said = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        labels = said if isinstance(said, list) else [said]
        return choices_problem(choices) or next(filter(None, (label_problem(one, choices) for one in labels)), None)
    if task.OUTPUT_TYPE != "generate_until" or task.config.doc_to_choice is not None:
        return None
    said = task.doc_to_target(row)
    answers = [str(one) for one in (said if isinstance(said, list) else [said])]
    if answers == ["None"] and None in row.values() and "None" not in row.values():  # what the harness makes of it
        return "the answer is null"
    return None if any(one.strip() for one in answers) else "the answer is empty"


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
    if len(bare) == 1:
        return "it has one choice alone, which is always right"
    twice = next((choice for choice in bare if bare.count(choice) > 1), None)
    return None if twice is None else f"two choices are the same: {twice!r}"


def label_problem(label: Any, choices: Sequence[str]) -> str | None:
    """A label is a choice's number from 0, of which false and true are two, or its text."""
    if isinstance(label, int):
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
