"""Bundles of every architecture answer as their experts do; by default one of every kind.

All of them take half an hour: `pytest -m sweep tests/sweep`.

docs/architectures.md is what `make sweep` writes of the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .__main__ import PAGE, outcomes_of, page
from .check import Outcome, check
from .experts import MULTIMODAL

# One for every way in which an architecture once went wrong, or is run.
KINDS = {
    "llama": "nothing but linear layers, norms and embeddings",
    "gpt2": "matrices stored the other way round",
    "phi": "a head with a bias",
    "nemotron": "a norm with arithmetic of its own",
    "qwen2_moe": "biases beside matrices that are fused in the model",
    "ernie4_5_moe": "block experts that see the tokens which chose them",
    "deepseek_v2": "positions as complex numbers",
    "deepseek_v3": "a stored buffer that another module reads",
    "gpt_oss": "a parameter on a module that has a cache; fused matrices with biases",
    "qwen3_5_text": "a convolution whose weight is read as an attribute",
    "falcon_mamba": "a norm whose weight is read as an attribute; recurrent states",
    "olmo_hybrid": "convolutions stored apart and joined in the model",
    "inkling2_text": "rows stored in another order",
    "hrm_text": "parameters stored joined and apart in the model",
    "roberta": "a tied bias that is not stored",
    "zamba": "layers that are in several places",
    "minimax": "a cache of its own class",
    "qwen4_exp_text": "positions on several axes in the cache",
    "xlnet": "tokens before rows",
    "recurrent_gemma": "a cache that is not given back, beside states that modules hold",
    "apertus": "parameters of an activation",
    "deepseek_v4": "a stored table of whole numbers",
}
# Models that read images as well, and that people fine-tune as text models: a text alone, every row by its own expert.
IMAGES = {
    "gemma3": "one class for both",
    "llama4 (images)": "two classes of one type; a mixture of block experts in one tensor",
    "llava_next (images)": "a text model of another type inside",
    "mistral3 (images)": "another tower of images",
    "qwen2_vl (images)": "positions on three axes",
    "qwen3_vl_moe (images)": "a mixture that is turned round only where it has another shape than the parameter",
}
NOT_BUILT = ("blt", "musicgen", "musicgen_melody")  # large however small the settings, or nothing to build


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("architecture", KINDS)
def test_every_kind_of_architecture_answers_as_its_experts_do(architecture: str) -> None:
    outcome = check(architecture, variants=("0",))
    assert outcome.status == "works", f"{KINDS[architecture]}: {outcome.step}: {outcome.detail}"
    assert 0 < outcome.worst < 1e-4  # it can fail


@pytest.mark.parametrize("architecture", IMAGES)
def test_models_that_read_images_as_well_answer_a_text_as_their_experts_do(architecture: str) -> None:
    outcome = check(architecture, variants=("0",))
    assert outcome.status == "works", f"{IMAGES[architecture]}: {outcome.step}: {outcome.detail}"
    assert 0 < outcome.worst < 1e-4


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL} - set(NOT_BUILT)))
def test_every_architecture_answers_as_its_experts_do(architecture: str) -> None:
    outcome = check(architecture)
    if outcome.status == "not built":
        pytest.skip(outcome.detail)
    assert outcome.status == "works", f"{outcome.step}: {outcome.detail}"


def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's own test: experts' own parameters that are not put in place."""
    from polymerge.model.own import OwnTensor

    monkeypatch.setattr(OwnTensor, "of", lambda self, weights: self.home[self.name].detach())
    outcome = check("qwen3_5_text", variants=("0",))
    assert outcome.status in ("wrong", "refused"), outcome


def test_a_sweep_goes_on_where_it_stood(tmp_path: Path) -> None:
    log = tmp_path / "outcomes.jsonl"
    assert outcomes_of(log) == outcomes_of(None) == {}
    outcome = Outcome("good", share=1.05, strategy="layers")
    log.write_text(json.dumps(asdict(outcome) | {"seconds": 1.0}) + "\n")
    assert outcomes_of(log) == {"good": outcome}


def test_the_page_that_is_kept_says_what_became_of_every_architecture() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (works|[\w ]+ \()", text, re.MULTILINE))
    assert set(rows) >= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_BUILT)
    assert sum(what == "works" for what in rows.values()) >= 170


def test_the_page_has_a_line_for_each() -> None:
    outcomes = [Outcome("good", share=1.05, strategy="layers"), Outcome("bad", "refused", "0: merge", "why | not")]
    lines = page(outcomes).splitlines()
    assert "1 of the 2 that can be built small work." in lines
    assert lines[-2:] == ["| good | works | layers | 1.05 |", "| bad | refused (0: merge): why \\| not |  |  |"]
