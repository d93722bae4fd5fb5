"""Models that cannot be padded: what they answer does not depend on who is beside them."""

from pathlib import Path

import numpy as np
import pytest

from polymerge import merge
from polymerge.engine import GenerateRequest
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.local.padding import rows_together
from tests.sweep.experts import make_experts
from tests.tiny import letters_tokenizer

PROMPTS = ["abc", "hello world this is longer", "xy", "some words of text"]


def engine_of(architecture: str, folder: Path) -> HFEngine:
    experts = make_experts(architecture, folder, count=2)
    for path in experts.values():
        letters_tokenizer().save_pretrained(path)
    recipe = {"experts": {name: str(path) for name, path in experts.items()}, "compress_rate": 0.0}
    return HFEngine.from_bundle(merge(recipe, folder / "bundle"), device="cpu")


@pytest.mark.parametrize(
    ("architecture", "together"),
    [("rwkv", "alone"), ("xlstm", "alike"), ("minimax", "alike"), ("recurrent_gemma", "alike"), ("bart", "alike")],
)
def test_rows_that_would_change_each_other_go_apart(architecture: str, together: str, tmp_path: Path) -> None:
    engine = engine_of(architecture, tmp_path)
    assert rows_together(engine) == together
    requests = [GenerateRequest(p, f"e{n % 2}", max_new_tokens=6) for n, p in enumerate(PROMPTS)]
    together = [answer.text for answer in engine.generate(requests)]
    assert together == [engine.generate([request])[0].text for request in requests]
    vectors = engine.embed(PROMPTS)
    alone = np.concatenate([engine.embed([prompt]) for prompt in PROMPTS])
    np.testing.assert_allclose(vectors, alone, atol=1e-4 * np.abs(alone).max())


@pytest.mark.parametrize("architecture", ["llama", "mamba", "jamba", "zamba2"])
def test_models_with_a_mask_go_together(architecture: str, tmp_path: Path) -> None:
    assert rows_together(engine_of(architecture, tmp_path)) == "padded"


def test_a_checkpoints_end_tokens_do_not_end_the_trial(tmp_path: Path) -> None:
    engine = engine_of("mamba", tmp_path)
    tokens = int(engine.hf.config.vocab_size)
    engine.hf.generation_config.eos_token_id = list(range(tokens))
    assert rows_together(engine) == "padded"
    assert engine.hf.generation_config.eos_token_id == list(range(tokens))


def test_a_prompt_of_one_token_does_not_go_on_with_the_text_before(tmp_path: Path) -> None:
    """RecurrentGemma's modules hold their states themselves, and take one token for a step."""
    engine = engine_of("recurrent_gemma", tmp_path)
    request = GenerateRequest("x", "e0", max_new_tokens=6)
    answers = set()
    for before in PROMPTS:
        engine.generate([GenerateRequest(before, "e0", max_new_tokens=4)])
        answers.add(engine.generate([request])[0].text)
    assert len(answers) == 1
