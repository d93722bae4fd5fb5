"""A server whose answers end only at their budget, a few milliseconds a token: for tests that act in the middle."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from polymerge.engine.local.batching import BatchingEngine
from tests.tiny import tiny_tokenizer


def slowed(engine: BatchingEngine, seconds: float) -> None:
    """Every step takes so long, and no token ends an answer."""
    batch: Any = engine._batch
    step = batch.step

    def slow() -> None:
        time.sleep(seconds)
        step()

    batch.step = slow
    voices = engine._engine.voices
    voices.average = replace(voices.average, defaults=replace(voices.average.defaults, ends=frozenset()))


def main(bundle: str, *words: str) -> None:
    """`polymerge serve` on a free port, slowed down."""
    from polymerge.cli.main import app
    from polymerge.model.mixed import MixedModel

    start = BatchingEngine.__init__

    def slow_start(self: BatchingEngine, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        slowed(self, 0.02)

    with patch.object(BatchingEngine, "__init__", slow_start), patch.object(MixedModel, "tokenizer", tiny_tokenizer()):
        app(["serve", bundle, "--engine", "transformers", "--port", "0", "--json", "--quiet", *words])
