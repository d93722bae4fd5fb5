"""Which class a checkpoint is opened with, and what is no language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from polymerge.sources.classes import class_for, out_of_scope
from polymerge.sources.layers import _roles
from tests.sweep.configs import tiny_config


@pytest.mark.parametrize(
    ("kind", "named", "what"),
    [
        ("t5", "T5ForConditionalGeneration", "an encoder-decoder"),
        ("t5", "T5EncoderModel", "an encoder-decoder"),
        ("bart", "BartForConditionalGeneration", "an encoder-decoder"),
        ("whisper", "WhisperForConditionalGeneration", "an encoder-decoder"),
        ("florence2", "Florence2ForConditionalGeneration", "an encoder-decoder"),
        ("distilbert", "DistilBertForMaskedLM", "a masked language model"),
        ("bert", "BertForMaskedLM", "a masked language model"),
        ("roberta", "RobertaForSequenceClassification", "a classifier"),
        ("llama", "LlamaForTokenClassification", "a classifier"),
        ("qwen2", "Qwen2ForQuestionAnswering", "a model that marks answers in a text"),
        ("vit", "ViTModel", "no causal language model"),
        ("llama", "LlamaForCausalLM", None),
        ("llama", "LlamaModel", None),
        ("bart", "BartForCausalLM", None),
        ("xlm", "XLMWithLMHeadModel", None),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", None),
        ("llama4", "Llama4ForConditionalGeneration", None),
        ("no-such-type", "NoSuchModel", None),
    ],
)
def test_what_is_no_language_model_is_known_by_its_class(kind: str, named: str, what: str | None) -> None:
    assert out_of_scope({"model_type": kind, "architectures": [named]}) == what


@pytest.mark.parametrize(
    ("config", "named", "cls"),
    [
        (transformers.LlamaConfig(), "LlamaForCausalLM", "LlamaForCausalLM"),
        (transformers.LlamaConfig(), "LlamaModel", "LlamaForCausalLM"),
        (transformers.Qwen2VLConfig(), "Qwen2VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
        (transformers.Llama4Config(), "Llama4ForConditionalGeneration", "Llama4ForConditionalGeneration"),
        (transformers.Gemma3Config(), "Gemma3ForConditionalGeneration", "Gemma3ForConditionalGeneration"),
        (transformers.Gemma3TextConfig(), "Gemma3ForCausalLM", "Gemma3ForCausalLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_a_checkpoint_is_opened_with_the_class_that_saved_it(config: Any, named: str, cls: str) -> None:
    config.architectures = [named]
    assert class_for(config).__name__ == cls


@pytest.mark.parametrize("architecture", ["inkling_text", "gemma3_text", "llama"])
def test_the_input_embedding_has_that_role_whatever_its_class_is_called(architecture: str) -> None:
    """Inkling's is an `InklingNormedEmbedding`."""
    with torch.device("meta"):
        config = tiny_config(architecture)
        model = transformers.AutoModelForCausalLM.from_config(config)
    roles = _roles(model)
    assert roles["model.embed_tokens.weight"] == ("embedding", False)
    assert roles["model.norm.weight"] == ("norm", False)
    assert roles.get("model.embed_tokens.embed_norm.weight", ("norm", False)) == ("norm", False)
