"""Which expert answers a question of an evaluation: one function a mode.

average         no expert
expert:NAME     always that one
routed          the router's choice, its fallback included
mixture         all experts, weighted by the router's probabilities
oracle          the best expert, by a label of the question

Knows questions, routes and labels; knows neither a model nor the harness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..router.route import Route, Routes

if TYPE_CHECKING:
    from ..model.assignment import RowExpert

MODES = ("average", "expert:NAME", "routed", "mixture", "oracle")


@dataclass(frozen=True)
class Question:
    """What an expert is chosen by.

    Attributes:
        text: what comes before the answer, without a chat template.
        task: the name of the harness's task.
        row: the data set's row.
    """

    text: str
    task: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


Choose = Callable[[Sequence[Question]], "list[RowExpert]"]


def average() -> Choose:
    """No expert at all."""
    return lambda questions: [None] * len(questions)


def always(expert: str, experts: Sequence[str]) -> Choose:
    """One expert. Raises ModelError where there is no such expert."""
    if expert not in experts:
        raise ModelError(f"mode expert:{expert}: no such expert; this model has {', '.join(experts) or 'none'}")
    return lambda questions: [expert] * len(questions)


def routed(router: Routes) -> Choose:
    """What the router says, its fallback included. A question without a text goes to the average."""

    def choose(questions: Sequence[Question]) -> list[RowExpert]:
        return [route.expert if route else None for route in _routes(router, questions)]

    return choose


def mixture(router: Routes, experts: Sequence[str], fields: Mapping[str, str] | None = None) -> Choose:
    """All experts at once. A field's probability goes to its expert, that of a field without one to the average.

    Args:
        fields: field -> expert; by default a field's expert has its name.
    """
    table = fields if fields is not None else {name: name for name in experts}

    def choose(questions: Sequence[Question]) -> list[RowExpert]:
        mixtures: list[RowExpert] = []
        for route in _routes(router, questions):
            weights: dict[str, float] = defaultdict(float)
            for name, probability in route.scores.items() if route else ():
                weights[table.get(name, "average")] += probability
            mixtures.append(dict(weights) if sum(weights.values()) > 0 else None)
        return mixtures

    return choose


def _routes(router: Routes, questions: Sequence[Question]) -> list[Route | None]:
    """A question's route; None for one without a text."""
    routes = iter(router.route([question.text for question in questions if question.text]))
    return [next(routes) if question.text else None for question in questions]


def oracle(experts: Sequence[str], best: Mapping[str, str] | None = None, label: str | None = None) -> Choose:
    """The best expert by label: the value of the row's key `label`, or else the task's name.

    Args:
        best: label -> expert; a label that is not in it must be an expert's own name.

    Raises:
        ModelError: `best` names an expert that is not there; later, a label for which no expert is known.
    """
    table = dict(best or {})
    for name, expert in table.items():
        if expert not in (*experts, "average"):
            raise ModelError(f"best expert of {name!r}: no expert {expert!r}; this model has {', '.join(experts)}")

    def choose(questions: Sequence[Question]) -> list[RowExpert]:
        return [_best(question, experts, table, label) for question in questions]

    return choose


def _best(question: Question, experts: Sequence[str], table: Mapping[str, str], label: str | None) -> str:
    name = question.task
    if label is not None:
        if label not in question.row:
            raise ModelError(f"mode oracle: a row of {question.task} has no key {label!r}")
        name = str(question.row[label])
    expert = table.get(name, name)
    if expert not in (*experts, "average"):
        raise ModelError(f"mode oracle: the best expert for {name!r} is not known; say `--best {name}=EXPERT`")
    return expert


def chooser(
    mode: str,
    experts: Sequence[str],
    *,
    router: Routes | None = None,
    fields: Mapping[str, str] | None = None,
    best: Mapping[str, str] | None = None,
    label: str | None = None,
) -> Choose:
    """The function of a mode, given by name.

    Raises:
        ModelError: an unknown mode or expert, or a mode that needs a router and has none.
    """
    kind, _, name = mode.partition(":")
    if kind == "expert" and name:
        return always(name, experts)
    if mode == "average":
        return average()
    if mode == "oracle":
        return oracle(experts, best, label)
    if mode not in ("routed", "mixture"):
        raise ModelError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
    if router is None:
        raise ModelError(f"mode {mode}: the bundle has no router; make one with `polymerge router fit`")
    return routed(router) if mode == "routed" else mixture(router, experts, fields)
