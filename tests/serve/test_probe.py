"""The start-up probe: whole bundles pass, an adapter that is ignored or changed is found."""

from typing import Any

import pytest
import torch

from polymerge import load_model
from polymerge.engine.local.engine import HFEngine
from polymerge.errors import ModelError
from polymerge.model.linear import MixedLinear
from polymerge.serve.probe import probe
from tests.conftest import Merged
from tests.tiny import tiny_tokenizer


def loaded(merged: Merged, architecture: str, **recipe: Any) -> HFEngine:
    bundle, _ = merged(architecture, **recipe)
    engine = HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint=bundle.digest)
    engine.encode = lambda text, special=True: list(range(5, 25))  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma3", "gpt2", "mixtral"])
def test_a_whole_bundle_passes(merged: Merged, architecture: str) -> None:
    engine = loaded(merged, architecture)
    seen: list[str] = []
    probe(engine, engine.model.bundle, progress=seen.append)
    assert seen == ["e0", "e1", "e2"]


def test_an_expert_whose_factors_are_lost_is_named(merged: Merged) -> None:
    engine = loaded(merged, "llama")
    for module in engine.hf.modules():
        if isinstance(module, MixedLinear):
            lo, hi = module.offsets[1], module.offsets[2]
            module.stacked_b[lo:hi] = 0
    with pytest.raises(ModelError, match="expert 'e1' does not answer as its reconstruction"):
        probe(engine, engine.model.bundle)


def test_one_lost_layer_is_enough(merged: Merged) -> None:
    engine = loaded(merged, "llama")
    module = next(module for module in engine.hf.modules() if isinstance(module, MixedLinear))
    module.stacked_b[module.offsets[2] : module.offsets[3]] = 0
    with pytest.raises(ModelError, match="expert 'e2'"):
        probe(engine, engine.model.bundle)


def test_an_expert_that_answers_as_the_average_is_refused(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loaded(merged, "llama", embeddings="average", norms="average")
    monkeypatch.setattr(engine, "assigned", lambda experts, rows: torch.inference_mode())
    with pytest.raises(ModelError, match="expert 'e0'"):
        probe(engine, engine.model.bundle)
