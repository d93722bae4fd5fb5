"""One evaluation by several modes, side by side.

Knows modes by name and what a user compares: accuracy by task and mode, and each mode's mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.files import write_bytes
from ..engine.base import Engine
from ..router.route import Routes
from .modes import chooser
from .run import HarnessSettings, accuracy, evaluate

if TYPE_CHECKING:
    from ..model.assignment import RowExpert


@dataclass(frozen=True)
class Comparison:
    """What every mode reached.

    Attributes:
        results: mode -> the harness's own results, as `evaluate` returns them.
    """

    results: Mapping[str, Mapping[str, Any]]

    @property
    def accuracies(self) -> dict[str, dict[str, float | None]]:
        """Task -> mode -> accuracy in [0, 1]; None where a task measures something else."""
        tasks = dict.fromkeys(task for result in self.results.values() for task in result["results"])
        return {
            task: {mode: accuracy(result["results"].get(task, {})) for mode, result in self.results.items()}
            for task in tasks
        }

    @property
    def means(self) -> dict[str, float | None]:
        """Mode -> mean accuracy over the tasks; groups of tasks are left out, their tasks count."""
        groups = {name for result in self.results.values() for name in result.get("groups", {})}
        rows = [row for task, row in self.accuracies.items() if task not in groups]
        means: dict[str, float | None] = {}
        for mode in self.results:
            values = [value for row in rows if (value := row[mode]) is not None]
            means[mode] = sum(values) / len(values) if values else None
        return means

    def summary(self) -> dict[str, Any]:
        """The results without the answers and the tasks' configurations, as plain data."""
        return {
            "accuracy": self.accuracies,
            "mean": self.means,
            "modes": {
                mode: {key: result[key] for key in ("results", "n-samples", "polymerge") if key in result}
                for mode, result in self.results.items()
            },
        }


def evaluate_modes(
    engine: Engine,
    tasks: Sequence[str | Mapping[str, Any]],
    modes: Sequence[str],
    *,
    router: Routes | None = None,
    fields: Mapping[str, str] | None = None,
    best: Mapping[str, str] | None = None,
    label: str | None = None,
    include_path: str | Path | None = None,
    settings: HarnessSettings | None = None,
    tokenizer: Any = None,
    tokenizer_of: Callable[[RowExpert], Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Comparison:
    """`polymerge.evaluate.evaluate` for every mode. With an engine that remembers its answers
    (`polymerge.engine.wrappers.cached`), a question that two modes send to one expert is answered once.

    Raises:
        ModelError: before anything runs, where a mode cannot work.
    """
    options = {"router": router, "fields": fields, "best": best, "label": label}
    choices = {mode: chooser(mode, engine.experts, **options) for mode in dict.fromkeys(modes)}  # type: ignore[arg-type]
    return Comparison(
        {
            mode: evaluate(
                engine,
                tasks,
                choose,
                include_path=include_path,
                settings=settings,
                tokenizer=tokenizer,
                tokenizer_of=tokenizer_of,
                about={"mode": mode, **(about or {})},
            )
            for mode, choose in choices.items()
        }
    )


def write_results(comparison: Comparison, file: Path) -> None:
    """The harness's whole results of every mode as JSON."""
    data = {**comparison.summary(), "modes": dict(comparison.results)}
    write_bytes(file, (json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n").encode())
