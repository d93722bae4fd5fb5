"""What `polymerge demo` starts: the demo, with the settings that its command has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .run import DemoResult, DemoSettings, Listeners, demonstrate
from .train import TrainSettings


def run_demo(
    output: str | Path = "demo-output",
    *,
    data: str | Path | None = None,
    skills: Sequence[str] | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    compress_rate: float = 0.95,
    listeners: Listeners | None = None,
) -> DemoResult:
    """Fine-tunes three experts of SmolLM2-135M, merges them, and measures what each keeps. Replaces an earlier demo.

    Args:
        output: the folder for the bundle and the report.
        data: your skills: NAME/train.jsonl and NAME/test.jsonl in a folder.
        skills: which of them; all by default.
        steps, learning_rate: of every expert's training.
        listeners: who hears of progress.

    Raises:
        SourceError: the base's package is not installed. RecipeError: unusable data.
    """
    usual = TrainSettings()
    settings = DemoSettings(
        output=Path(output),
        data=Path(data) if data else None,
        skills=list(skills) if skills else None,
        train=replace(usual, steps=steps or usual.steps, learning_rate=learning_rate or usual.learning_rate),
        compress_rate=compress_rate,
        overwrite=True,
    )
    return demonstrate(settings, listeners or Listeners(say=lambda text: None))
