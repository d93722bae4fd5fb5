"""What an assessment found, as plain data: what the command prints, the report draws and `router fit` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle.files import write_bytes
from ..version import __version__
from .measure import Measurement
from .propose import Proposals

FORMAT = "polymerge-assessment"
FORMAT_VERSION = 1
ROLES = ("candidate", "thinker")


@dataclass
class Candidate:
    """One model and what it reached.

    Attributes:
        source: as its recipe writes it.
        role: "candidate" or "thinker".
        measured: field -> task -> measurement.
        failed: field -> why it has no accuracy; "" stands for all fields.
    """

    name: str
    source: str
    role: str = "candidate"
    measured: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def accuracies(self, fields: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
        """Field -> mean accuracy over its tasks, for the fields whose every task was measured."""
        accuracies = {}
        for name, tasks in fields.items():
            measured = self.measured.get(name, {})
            if all(task in measured for task in tasks):
                accuracies[name] = sum(measured[task].accuracy for task in tasks) / len(tasks)
        return accuracies

    @property
    def peak_memory(self) -> int:
        """Bytes; 0 where nothing was measured."""
        return max((m.peak_memory for tasks in self.measured.values() for m in tasks.values()), default=0)

    @property
    def working_memory(self) -> int:
        """Bytes beside the weights, where a GPU's allocator counted them; 0 where only the process was measured."""
        on_gpu = [m for tasks in self.measured.values() for m in tasks.values() if m.on_gpu]
        return max((m.peak_memory - m.weights_bytes for m in on_gpu), default=0)

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the tasks that ran."""
        rates = [m.tokens_per_second for tasks in self.measured.values() for m in tasks.values() if m.tokens_per_second]
        return sum(rates) / len(rates) if rates else None

    def to_json(self, fields: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        return {
            "source": self.source,
            "accuracy": self.accuracies(fields),
            "peak_memory": self.peak_memory,
            "tokens_per_second": self.tokens_per_second,
            "failed": self.failed,
            "measured": {
                name: {task: measurement.to_json() for task, measurement in tasks.items()}
                for name, tasks in self.measured.items()
            },
        }


@dataclass(frozen=True)
class Assessment:
    """A whole assessment.

    Attributes:
        fields: field -> its tasks.
        proposals: None where no candidate could be measured.
    """

    fields: Mapping[str, tuple[str, ...]]
    candidates: tuple[Candidate, ...]
    proposals: Proposals | None
    settings: Mapping[str, Any]

    @property
    def table(self) -> dict[str, dict[str, float]]:
        """Field -> candidate -> accuracy: what `router fit --table` takes. Failures have no entry."""
        table: dict[str, dict[str, float]] = {name: {} for name in self.fields}
        for candidate in self.candidates:
            if candidate.role == "candidate":
                for name, value in candidate.accuracies(self.fields).items():
                    table[name][candidate.name] = value
        return table

    def to_json(self) -> dict[str, Any]:
        rows = {role: {c.name: c.to_json(self.fields) for c in self.candidates if c.role == role} for role in ROLES}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "polymerge_version": __version__,
            "fields": self.table,
            "candidates": rows["candidate"],
            "thinkers": rows["thinker"],
            "proposal": self.proposals.to_json() if self.proposals else None,
            "settings": dict(self.settings),
        }


def write_assessment_table(assessment: Assessment, file: Path) -> None:
    """The assessment as the JSON file that `router fit --table` takes."""
    write_bytes(file, (json.dumps(assessment.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
